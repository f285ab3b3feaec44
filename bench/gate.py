"""The gate's error rates: simulated releases that are equal, worse or better, through the gate's own functions.

    python -m bench.gate [--trials 400] [--quick] [--only WORDS] [--json FILE]

A champion judges each image of a hold-out rightly with a chance of 90 %. A candidate says the same but for a share of
images (`redrawn`) of which it knows nothing of the champion's answer; one that is better or worse corrects or spoils
further images. Each is the best of ten epochs on a validation part of half the hold-out's size, and under `delivery`
each answer of either side is turned with a chance of 0 or 1 %. Reigns are ten candidates in a row on one hold-out.
Rows that need it have a new generator besides, which the candidate finds and the champion does not. In rows of
records the images are versions of the same pictures, in groups, on which releases err together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from code_worker.settings import GateSettings
from code_worker.training.gate.gate_inputs import Comparison, GateInputs, ReleaseScores, spend
from code_worker.training.gate.paired import proportion_limits
from code_worker.training.gate.rule import decide

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    Flags = NDArray[np.bool_]

ACCURACY = 0.9
EPOCHS = 10
SETTINGS = GateSettings()


@dataclass(frozen=True, slots=True)
class World:
    """A hold-out, and what its candidates are like.

    Attributes:
        reals: real images.
        fakes: generated ones of each old generator.
        generators: how many old ones.
        newcomer: fakes of a new one, of which the champion finds a half and the candidate nine tenths.
        change: accuracy that a candidate has beyond the champion's on everything old.
        harmed: accuracy that it has beyond that on the first generator.
        redrawn: share of the images of which a candidate does not repeat the champion's answer.
        noise: chance that an answer is turned under delivery.
        candidates: in a row, until one is promoted.
        refused: candidates that were refused on the same hold-out before.
        records: a real image and a fake of each generator are versions of one picture, are in one group, and change
            alike; else each image is by itself.
    """

    reals: int
    fakes: int
    generators: int
    newcomer: int = 0
    change: float = 0.0
    harmed: float = 0.0
    redrawn: float = 0.2
    noise: float = 0.0
    candidates: int = 1
    refused: int = 0
    records: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A question and its bar.

    Attributes:
        question: in words.
        world: where it is asked.
        counts: `promoted`, or `worse`: vetoed as worse on a group.
        bar: such as `<= 0.05`.
    """

    question: str
    world: World
    counts: str
    bar: str


def main() -> None:
    """Runs the simulation and prints a table."""
    parser = argparse.ArgumentParser(prog="bench.gate")
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="40 trials.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="Rows whose question has these words.")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    trials = 40 if chosen.quick else chosen.trials
    found = []
    with ProcessPoolExecutor(chosen.processes) as pool:
        for row in (one for one in rows() if chosen.only in one.question):
            share = np.mean(list(pool.map(partial(_trial, row), range(trials), chunksize=max(1, trials // 8))))
            low, high = proportion_limits(float(share) * trials, trials, 0.025)
            found.append({**asdict(row), "trials": trials, "share": float(share), "low": low, "high": high})
            print(f"{_named(row):<96} {share:6.1%} ({low:.1%} to {high:.1%})  bar {row.bar}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def rows() -> Iterator[Row]:
    """Every question on every hold-out."""
    small, middle, many = World(100, 100, 1), World(300, 75, 4), World(400, 100, 20)
    for noise in (0.0, 0.01):
        for world in (small, middle, many):
            equal = replace(world, noise=noise)
            yield Row("equal, promoted in a reign", replace(equal, candidates=10), "promoted", "<= 0.05")
            yield Row("equal, called worse", equal, "worse", "<= 0.05")
            worse = replace(equal, change=-0.02, newcomer=60)
            yield Row("2 points worse on all that is old", worse, "promoted", "<= 0.05")
        for world, bar in ((middle, ">= 0.8"), (many, ">= 0.7")):
            yield Row("5 points better", replace(world, noise=noise, change=0.05), "promoted", bar)
        for change, refused in ((0.05, 9), (0.025, 0), (0.025, 4), (0.025, 9)):
            later = replace(middle, noise=noise, change=change, refused=refused)
            yield Row(f"{100 * change:g} points better, after {refused} refused", later, "promoted", "none")
        for world in (middle, many):
            records = replace(world, noise=noise, records=True)
            yield Row(
                "equal records, promoted in a reign",
                replace(records, candidates=10),
                "promoted",
                "<= 0.05",
            )
            yield Row("equal records, called worse", records, "worse", "<= 0.05")
            worse = replace(records, change=-0.02, newcomer=60)
            yield Row("records, 2 points worse on all old", worse, "promoted", "<= 0.05")
        for redrawn in (0.1, 0.2, 0.5, 1.0):
            harmed = replace(many, noise=noise, harmed=-0.15, newcomer=60, redrawn=redrawn)
            yield Row("15 points worse on one", harmed, "promoted", "<= 0.2")
        for world in (small, middle, many):
            yield Row(
                "equal but for a newcomer it finds", replace(world, noise=noise, newcomer=60), "promoted", "none"
            )


def _named(row: Row) -> str:
    world = row.world
    old = f"{world.reals} + {world.generators} x {world.fakes}"
    return f"{row.question:<36} {old:<14} redrawn {world.redrawn:.0%}, noise {world.noise:.0%}, new {world.newcomer}"


def _trial(row: Row, seed: int) -> bool:
    """Whether it happened in one world."""
    rng = np.random.default_rng([seed, row.world.reals, round(100 * row.world.noise)])
    return any(_ends(row, decision) for decision in _reign(row.world, rng))


def _ends(row: Row, decision: tuple[bool, tuple[str, ...]]) -> bool:
    promoted, reasons = decision
    return promoted if row.counts == "promoted" else any(reason.startswith("worse on") for reason in reasons)


def _reign(world: World, rng: Generator) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Decisions on candidates in a row, until one is promoted."""
    labels, generators, accuracy = _images(world)
    pictures = _pictures(world)
    champion = _draws(pictures, rng) < accuracy
    before: list[Comparison] = []
    for _ in range(world.refused):
        before.append(Comparison(len(labels), spend(before, len(labels), SETTINGS.error).level))
    for _ in range(world.candidates):
        spending = spend(before, len(labels), SETTINGS.error)
        candidate = _best_epoch(world, champion, generators, pictures, rng)
        inputs = GateInputs(
            labels=labels,
            generators=tuple(generators),
            new=np.array([name == "new" for name in generators]),
            candidate=_opinion("candidate", labels, candidate, world, rng),
            champion=_opinion("champion", labels, champion, world, rng),
            min_holdout=20,
            spending=spending,
            group_of=tuple(f"{picture:06}" for picture in pictures),
        )
        decision = decide(inputs, SETTINGS)
        before.append(Comparison(len(labels), spending.level))
        yield decision.promote, decision.reasons
        if decision.promote:
            return


def _images(world: World) -> tuple[NDArray[np.int8], NDArray[np.object_], NDArray[np.float64]]:
    """Labels, generators, and the champion's chance to be right."""
    fakes = [f"g{place % world.generators:02}" for place in range(world.fakes * world.generators)]
    names: list[str | None] = [*[None] * world.reals, *fakes, *["new"] * world.newcomer]
    generators = np.array(names, dtype=object)
    labels = np.array([name is not None for name in names], np.int8)
    return labels, generators, np.where(generators == "new", 0.5, ACCURACY)


def _pictures(world: World) -> NDArray[np.int64]:
    """Number of the picture that each image is of."""
    if not world.records:
        return np.arange(world.reals + world.fakes * world.generators + world.newcomer)
    fakes = np.arange(world.fakes * world.generators) // world.generators
    return np.concatenate([np.arange(world.reals), fakes, np.arange(world.newcomer)])


def _draws(pictures: NDArray[np.int64], rng: Generator) -> NDArray[np.float64]:
    """A random number of each picture, for each image of it."""
    return rng.random(int(pictures.max()) + 1)[pictures]


def _best_epoch(
    world: World, champion: Flags, generators: NDArray[np.object_], pictures: NDArray[np.int64], rng: Generator
) -> Flags:
    """Of ten epochs that are equally good the one that the validation part likes best."""
    validation = rng.random((EPOCHS, max(20, len(champion) // 2))) < ACCURACY + world.change
    epochs = [_candidate(world, champion, generators, pictures, rng) for _ in range(EPOCHS)]
    return epochs[int(validation.mean(axis=1).argmax())]


def _candidate(
    world: World, champion: Flags, generators: NDArray[np.object_], pictures: NDArray[np.int64], rng: Generator
) -> Flags:
    again, anew, spoils, corrects, found = (_draws(pictures, rng) for _ in range(5))
    own = np.where(again < world.redrawn, anew < ACCURACY, champion)
    change = np.full(len(champion), world.change) + np.where(generators == "g00", world.harmed, 0.0)
    spoiled = spoils < np.where(change < 0, -change / ACCURACY, 0.0)
    corrected = corrects < np.where(change > 0, change / (1 - ACCURACY), 0.0)
    own = (own & ~spoiled) | corrected
    # A newcomer's half that the champion misses is its own, whatever picture it was made of.
    return np.where(generators == "new", champion | (found < 0.8), own)


def _opinion(name: str, labels: NDArray[np.int8], correct: Flags, world: World, rng: Generator) -> ReleaseScores:
    delivered = correct ^ (rng.random(len(labels)) < world.noise)
    by_condition = {
        condition: {"linear": np.where(flags == (labels == 1), 0.9, 0.1).astype(np.float32)}
        for condition, flags in (("clean", correct), ("delivery", delivered))
    }
    return ReleaseScores(name, "linear", 0.5, by_condition)


if __name__ == "__main__":
    main()
