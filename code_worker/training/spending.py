"""Spends the gate's chance of error over all candidates that are compared with one champion.

Every candidate that is compared on the same hold-out is another chance to pass by luck. The chance that any of them
does is at most the sum of the levels at which they are tested (alpha spending; Lan & DeMets, Biometrika 70, 1983,
659-663). That holds although the same images decide each time: a champion's reign lasts only while all candidates
were refused, so that what is learned from earlier comparisons is nothing but that (the argument of the Ladder, Blum &
Hardt, ICML 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Comparison", "Spending", "spend"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """An earlier comparison with the same champion.

    Attributes:
        images: size of its hold-out.
        level: chance of error that it was allowed.
    """

    images: int
    level: float


@dataclass(frozen=True, slots=True)
class Spending:
    """What one comparison may err, and what is left for those that follow.

    Attributes:
        level: of this comparison.
        error: of the champion's whole reign.
        before: comparisons with this champion before this one.
        spent: their levels and this one's.
        left_now: still to be spent on a hold-out of this size.
        left: still to be spent at all; what is not there now opens as the hold-out grows.
    """

    level: float
    error: float
    before: int
    spent: float
    left_now: float
    left: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def spend(before: Sequence[Comparison], images: int, error: float) -> Spending:
    """The level of the next comparison with a champion.

    On its first hold-out, of `N` images, half of `error` may be spent; once the hold-out has grown `g`-fold,
    `1 - 1 / 2g` of it. Each comparison takes half of what may be spent and was not: the sum over a whole reign stays
    below `error` however many there are, and new labels, which add images to the hold-out, always add room.

    Args:
        before: earlier comparisons with the same champion, the first one first.
        images: size of the hold-out now.
        error: chance that an equal release replaces the champion in its whole reign.
    """
    first = before[0].images if before else images
    growth = max(1.0, images / max(1, first))
    spent = sum(one.level for one in before)
    free = error * (1 - 1 / (2 * growth)) - spent
    level = max(0.0, free) / 2
    return Spending(level, error, len(before), spent + level, max(0.0, free) - level, error - spent - level)
