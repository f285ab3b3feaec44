"""Whole runs before the gate, on clean and on wrong labels; what was promoted, and what that cost old generators.

    python -m bench.gate_runs DIRECTORY [--trials 20] [--kind refit] [--margin 0.05] [--clean] [--json FILE]

The starter is the champion, its heads fitted on the toy generators that it learned from. Each trial draws images of
a pool by its own seed, none of which the champion learned from, among them those of a newcomer; labels them (rightly,
or with 30 % of the reals or of the fakes called the other), and runs the same `Learner` as a schedule does, in a
deployment of its own. Whatever is promoted is measured beside the champion on 500 images of each old generator and as
many reals of each that nobody labelled. Exit status 1 when anything was promoted on wrong labels.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.photographs import LEARNED_FROM, Album
from bench.toy_data import write_records
from code_worker.data.kept_copies import open_kept
from code_worker.demo.starter_release import build_starter_release
from code_worker.demo.toy_images import GENERATORS, NEWCOMERS
from code_worker.encoder.torch_engine import Engine
from code_worker.images.decode import decode
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import GateSettings, Settings
from code_worker.store import migrate
from code_worker.store.engine import Session, Store, open_store
from code_worker.store.learning import kept_images, labels
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.labels import NewLabel
from code_worker.training.evaluation.metrics import right
from code_worker.training.gate.paired import difference_limits
from code_worker.training.learner import Learner
from code_worker.training.snapshot import Member
from code_worker.training.snapshot_embeddings import open_encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.releases.loading import LoadedRelease
    from code_worker.store.learning.runs import Run
    from code_worker.training.fitting.job import Item

SIZE = 232
WRONG = 0.3
OLD_POOL, NEW_POOL, FITTED = 1500, 300, 500
OLD, NEW = 600, 200
"""Records of a trial, each a real image and a generated one."""
EVERYONE = {**GENERATORS, **NEWCOMERS}
NEWCOMER = "toy-dotted"
USUAL = GateSettings().max_regression
UNLABELLED = 500
"""Images of each old generator, and as many reals, by which what was promoted is measured."""
CASES = {"clean": None, "wrong reals": 0, "wrong fakes": 1}


@dataclass(frozen=True, slots=True)
class Pool:
    """A deployment to copy: champion, kept images that it did not learn from, and their embeddings."""

    directory: Path
    old: list[Item]
    new: list[Item]
    unlabelled: list[Item]
    margin: float

    def settings(self, database: Path) -> Settings:
        """Settings of a deployment that shares images and releases with the others."""
        return Settings(
            data_dir=database.parent,
            database_url=f"sqlite:///{database}",
            artifacts=str(self.directory / "releases"),
            datasets=str(self.directory / "dataset"),
            device="cpu",
            gate=GateSettings(max_regression=self.margin),
        )


def main() -> None:
    """Runs the trials and prints a table."""
    parser = argparse.ArgumentParser(prog="bench.gate_runs")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kind", choices=["refit", "retrain"], default="refit")
    parser.add_argument("--generator", choices=list(EVERYONE), default=NEWCOMER, help="The newcomer.")
    parser.add_argument("--fitted", type=int, default=FITTED, help="Records that its heads learned from.")
    parser.add_argument("--margin", type=float, help="Loss that must be excluded, instead of the usual one.")
    parser.add_argument("--clean", action="store_true", help="Rightly labelled trials alone.")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    pool = make_pool(chosen.directory, chosen.generator, chosen.fitted, chosen.margin or USUAL)
    found = []
    for number in range(chosen.trials):
        # Every trial on clean labels has one on wrong labels beside it; the class takes turns.
        for case in ("clean",) if chosen.clean else ("clean", list(CASES)[1 + number % 2]):
            found.append(trial(pool, number, case, chosen.kind))
            print(json.dumps(found[-1]), flush=True)
    for case in CASES:
        states = Counter(one["state"] for one in found if one["case"] == case)
        usual = sum(one["usual"] for one in found if one["case"] == case)
        print(f"{case:<12} {dict(states)}, {usual} promoted at a margin of {USUAL:g}")
    _print_cost([one["cost"] for one in found if one["cost"] and one["case"] == "clean"])
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(one["state"] == "promoted" for one in found if one["case"] != "clean"):
        raise SystemExit("promoted on wrong labels")


def _print_cost(costs: list[dict[str, Any]]) -> None:
    """Mean and worst change of each group over what was promoted."""
    for name in sorted({name for cost in costs for name in cost}):
        rows = [cost[name] for cost in costs]
        worst = min(rows, key=lambda row: row["change"])
        print(
            f"{name:<18} {len(rows)} promoted, mean change {np.mean([row['change'] for row in rows]):+.3f}, worst "
            f"{worst['change']:+.3f} (95 % {worst['low']:+.3f} to {worst['high']:+.3f})"
        )


def make_pool(directory: Path, generator: str, fitted: int, margin: float) -> Pool:
    """Writes the images, keeps and embeds them, and promotes the starter."""
    album = Album(LEARNED_FROM)
    known = {name: make for name, make in GENERATORS.items() if name != generator}
    old = write_records(directory / "old", album, OLD_POOL, seed=41, size=SIZE, generators=known)
    newcomer = {generator: EVERYONE[generator]}
    new = write_records(directory / "new", album, NEW_POOL, seed=42, size=SIZE, generators=newcomer)
    apart = write_records(
        directory / "unlabelled", album, UNLABELLED * len(known), seed=43, size=SIZE, generators=known
    )
    settings = Pool(directory, [], [], [], margin).settings(directory / "template.db")
    plugins = load_plugins(settings)
    kept = open_kept(settings)
    with closing(open_store(settings.resolved_database_url)) as store:
        migrate.upgrade(store)
        registry = open_registry(settings, store=store, plugins=plugins)
        taught, old = old[: 2 * fitted], old[2 * fitted :]
        crops = np.stack([decode(Path(item.path).read_bytes(), settings.limits)[0] for item in taught])
        known_labels = np.array([item.label for item in taught], np.int8)
        build_starter_release(directory / "release", crops, known_labels, plugins)
        registry.promote(registry.add(directory / "release"), by="bench")
        rows = []
        for item in [*old, *new]:
            data = Path(item.path).read_bytes()
            kept.put(data)
            rows.append(KeptImage(item.sha256, len(data), None, None, None, item.path))
        store.run(lambda session: kept_images.note_kept(session, rows))
        _embed(settings, store, [*old, *new])
    return Pool(directory, old, new, apart, margin)


def _embed(settings: Settings, store: Store, items: list[Item]) -> None:
    """Once for all trials, as a deployment's workers would have."""
    champion = open_registry(settings, store=store, plugins=load_plugins(settings))
    loaded = champion.load(str(champion.champion()))
    members = [Member(item.sha256, item.label, item.generator, None, new=True) for item in items]
    with open_encoder(
        loaded.weights, loaded.encoder_sha256, settings=settings, store=store, kept=open_kept(settings)
    ) as encoder:
        encoder.see(members)


def trial(pool: Pool, seed: int, case: str, kind: str) -> dict[str, Any]:
    """One run on labels of its own."""
    place = pool.directory / f"{kind}-{seed}-{case.replace(' ', '-')}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copy(pool.directory / "template.db", place / "code_worker.db")
    settings = pool.settings(place / "code_worker.db")
    with closing(open_store(settings.resolved_database_url)) as store:
        store.run(lambda session: _label(session, _said(pool, seed, CASES[case])))
        began = time.monotonic()
        run = Learner(settings, store).learn(kind, by="bench", force=True)
        if run is None:
            raise SystemExit("no run was begun")
        seconds = round(time.monotonic() - began, 1)
        cost = _cost(pool, settings, store, run) if run.state == "promoted" else {}
    shutil.rmtree(place / "runs", ignore_errors=True)
    return {
        "seed": seed,
        "case": case,
        "state": run.state,
        "usual": run.state == "promoted" and _within(run.report["gate"], USUAL),
        "reasons": list(run.reasons),
        "noise": [noise["share"] for noise in run.report.get("gate", {}).get("noise", ())],
        "cost": cost,
        "seconds": seconds,
    }


def _within(gate: dict[str, Any], margin: float) -> bool:
    """Whether what was promoted at a wider margin keeps this one."""
    harmed = any(change["proven"] > margin for change in gate["changes"])
    return not harmed and all(loss["low"] > -margin for loss in gate["losses"])


def _cost(pool: Pool, settings: Settings, store: Store, run: Run) -> dict[str, Any]:
    """Change of accuracy by group on images that nobody labelled, with 95 % limits."""
    registry = open_registry(settings, store=store, plugins=load_plugins(settings))
    labels = np.array([item.label for item in pool.unlabelled], np.int8)
    crops = np.stack([decode(Path(item.path).read_bytes(), settings.limits)[0] for item in pool.unlabelled])
    before, after = (_right(registry.load(str(name)), crops, labels) for name in (run.base_release, run.candidate))
    changes = after.astype(np.int8) - before.astype(np.int8)
    names = np.array([item.generator or "real" for item in pool.unlabelled])
    found = {}
    for name in sorted(set(names)):
        of_group = changes[names == name]
        low, high = difference_limits(of_group, np.full(len(of_group), 1 / len(of_group)), 0.025)
        found[name] = {"n": len(of_group), "change": float(of_group.mean()), "low": low, "high": high}
    return found


def _right(release: LoadedRelease, crops: NDArray[np.uint8], labels: NDArray[np.int8]) -> NDArray[np.bool_]:
    engine = Engine(release.weights, device="cpu")
    embeddings = np.concatenate([engine.embed(crops[i : i + 64]) for i in range(0, len(crops), 64)])
    thresholds = release.manifest.thresholds
    scores = release.heads[release.manifest.default_head or "linear"].score(embeddings)
    return right(labels, scores, (thresholds.low, thresholds.high))


def _label(session: Session, new: list[NewLabel]) -> None:
    labels.add(session, new)


def _said(pool: Pool, seed: int, wrong: int | None) -> list[NewLabel]:
    """What is said of the images of a trial; 30 % of the class `wrong` are called the other."""
    rng = np.random.default_rng(seed)
    items = [*_records(rng, pool.old, OLD), *_records(rng, pool.new, NEW)]
    names = sorted({item.generator for item in items if item.generator})
    suspects = [place for place, item in enumerate(items) if item.label == wrong]
    errors = set(rng.choice(suspects, round(WRONG * len(suspects)), replace=False).tolist()) if suspects else set()
    said = []
    for place, item in enumerate(items):
        fake = item.label == 1 if place not in errors else item.label == 0
        generator = (item.generator or str(rng.choice(names))) if fake else None
        said.append(NewLabel(item.sha256, "fake" if fake else "real", "bench", "bench", generator=generator))
    return said


def _records(rng: np.random.Generator, items: list[Item], count: int) -> list[Item]:
    """Whole records: items come in pairs."""
    chosen = rng.choice(len(items) // 2, count, replace=False)
    return [items[2 * int(place) + side] for place in sorted(chosen) for side in (0, 1)]


if __name__ == "__main__":
    main()
