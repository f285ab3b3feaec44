"""Embeddings as a middling encoder gives them: reals, old generators and a new one, some labels wrong if asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from code_worker.training.gate.gate_inputs import GateInputs, ReleaseScores
from code_worker.training.gate.label_quality import label_noise
from code_worker_heads.linear import LinearHead

NEW = "gen_3"


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Labelled embeddings; `truth` is what the labels would be if nobody erred."""

    embeddings: NDArray[np.float32]
    labels: NDArray[np.int8]
    truth: NDArray[np.int8]
    generators: NDArray[np.object_]
    new: NDArray[np.bool_]
    holdout: NDArray[np.bool_]


def world(seed: int, *, flipped: int | None = None, distance: float = 5.0, share: float = 0.3) -> World:
    """400 reals and 150 fakes of each of four generators; `share` of the class `flipped` carry the other label.

    Generators differ from reals in a direction that they share, and more so each in one of its own.
    """
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(1)
    towards = fixed.normal(size=(5, 192))
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    made_by = np.repeat(np.arange(-1, 4), [400, 150, 150, 150, 150])
    shift = np.where(made_by[:, None] < 0, 0.0, distance * (0.4 * towards[4] + 0.9 * towards[made_by]))
    embeddings = (rng.normal(size=(len(made_by), 192)) + shift).astype(np.float32)
    truth = (made_by >= 0).astype(np.int8)
    generators = np.array([f"gen_{number}" if number >= 0 else None for number in made_by], dtype=object)
    new = (generators == NEW) | ((truth == 0) & (rng.random(len(truth)) < 0.3))
    labels = truth.copy()
    if flipped is not None:
        candidates = np.flatnonzero(truth == flipped)
        wrong = rng.choice(candidates, round(share * len(candidates)), replace=False)
        labels[wrong] = 1 - flipped
        generators[wrong] = None if flipped else rng.choice([f"gen_{number}" for number in range(4)], len(wrong))
    return World(embeddings, labels, truth, generators, new, rng.random(len(truth)) < 0.2)


def refitted(seen: World) -> GateInputs:
    """A champion that knows neither the new generator nor a wrong label, and the same head fitted on all there is."""
    old = ~seen.new & ~seen.holdout
    champion = LinearHead({}).fit(seen.embeddings[old], seen.truth[old])
    candidate = LinearHead({}).fit(seen.embeddings[~seen.holdout], seen.labels[~seen.holdout])
    held = seen.embeddings[seen.holdout]
    everything = np.ones(len(seen.labels), dtype=np.bool_)
    return GateInputs(
        labels=seen.labels[seen.holdout],
        generators=tuple(seen.generators[seen.holdout]),
        new=seen.new[seen.holdout],
        candidate=ReleaseScores("r-candidate", "linear", 0.5, {"clean": {"linear": candidate.score(held)}}),
        champion=ReleaseScores("r-champion", "linear", 0.5, {"clean": {"linear": champion.score(held)}}),
        noise=(
            *label_noise(seen.embeddings, seen.labels, everything, among="all images"),
            *label_noise(seen.embeddings, seen.labels, seen.new, among="new images"),
        ),
        min_holdout=20,
    )
