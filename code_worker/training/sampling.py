"""Which images a step learns from: a pure function of seed, step and rank, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from code_worker.errors import TrainingError

if TYPE_CHECKING:
    from numpy.random import Generator

    from code_worker.training.job import Item

__all__ = ["RecordSampler", "generator_of_step"]

T = TypeVar("T")


def generator_of_step(seed: int, step: int, rank: int = 0) -> Generator:
    """The random numbers of one process in one step; no other step or process has the same."""
    return np.random.default_rng((seed, step, rank))


class RecordSampler:
    """Draws records: one real image and one generated one.

    Every generator is drawn equally often, however many images it has; `new_share` of the generated images are of
    what the champion never learned, and half as many of the real ones. A generated image comes with a real one of its
    group (the photograph that it was made from, another image of the same post), as in D³; where its group has none
    the two are drawn apart, which the objective does not mind: its negatives are unpaired.

    Raises:
        TrainingError: no real or no generated image.
    """

    def __init__(self, items: Sequence[Item], *, new_share: float) -> None:
        reals = [number for number, item in enumerate(items) if item.label == 0]
        fakes = [number for number, item in enumerate(items) if item.label == 1]
        if not reals or not fakes:
            raise TrainingError(
                f"{len(reals)} real and {len(fakes)} generated images to learn from: both kinds are needed"
            )
        self._groups = [item.group for item in items]
        self._siblings: dict[str | None, list[int]] = {}
        for number in reals:
            self._siblings.setdefault(items[number].group, []).append(number)
        self._old_reals = [number for number in reals if not items[number].new]
        self._new_reals = [number for number in reals if items[number].new]
        self._old = _by_generator(items, [number for number in fakes if not items[number].new])
        self._new = _by_generator(items, [number for number in fakes if items[number].new])
        self._new_share = new_share

    def draw(self, rng: Generator, records: int) -> list[tuple[int, int]]:
        """Positions of a real and a generated image for each of `records` records."""
        return [self._record(rng) for _ in range(records)]

    def _record(self, rng: Generator) -> tuple[int, int]:
        fakes = self._old_or_new(rng, self._old, self._new, self._new_share)
        fake = _one_of(rng, _one_of(rng, fakes))
        group = self._groups[fake]
        if group is not None and group in self._siblings:
            return _one_of(rng, self._siblings[group]), fake
        return _one_of(rng, self._old_or_new(rng, self._old_reals, self._new_reals, self._new_share / 2)), fake

    @staticmethod
    def _old_or_new(rng: Generator, old: Sequence[T], new: Sequence[T], share: float) -> Sequence[T]:
        # Drawn in any case: what there is must not shift the numbers that follow.
        wants_new = rng.random() < share
        return new if new and (wants_new or not old) else old


def _one_of(rng: Generator, members: Sequence[T]) -> T:
    return members[int(rng.integers(len(members)))]


def _by_generator(items: Sequence[Item], numbers: Sequence[int]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for number in numbers:
        found.setdefault(items[number].generator or "", []).append(number)
    return [found[name] for name in sorted(found)]
