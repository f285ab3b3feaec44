"""Thresholds by labelled images: where to draw the lines so that false alarms and misses stay under stated shares.

Both lines are order statistics, as split conformal prediction draws them (Vovk, Gammerman & Shafer 2005; Angelopoulos
& Bates 2021): with n real images, `high` lies just above the ⌈(n + 1)(1 - α)⌉-th lowest of their scores. For any
distribution of the scores, a further real image from the same source is then called fake with a chance of at most α,
on average over the images that happened to be labelled. Of these themselves, at most α are.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.errors import DatasetError
from code_worker.training.evaluation.metrics import wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

RULE: Final = "split conformal: high above the ceil((n+1)(1-max_fpr))-th real, low at the floor((m+1)max_fnr)-th fake"
_SLACK: Final = 1e-9
_NEXT_TO_NOTHING: Final = 0.8
"""Share of images that stay uncertain, on average over both classes, from which thresholds hardly decide anything."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Effects of thresholds on the images at hand; intervals are Wilson's, 95 %; None without such images.

    Attributes:
        fpr: reals called fake.
        tpr: fakes called fake.
        fnr: fakes called real.
        uncertain_real: reals called neither.
        uncertain_fake: fakes called neither.
    """

    fpr: dict[str, float] | None
    tpr: dict[str, float] | None
    fnr: dict[str, float] | None
    uncertain_real: dict[str, float] | None
    uncertain_fake: dict[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Thresholds, and how they came about.

    Attributes:
        low: below it real.
        high: from it on fake; between the two uncertain.
        note: what was decided beside the rule, such as why a border stays where it was.
        shares: what they do to the images that they were drawn by.
        low_kept: whether `low` is that of before, since there were too few fakes to place it.
    """

    low: float
    high: float
    note: str
    shares: Shares
    low_kept: bool = False

    @property
    def warning(self) -> str:
        """Returns why these thresholds are of little use, or empty.

        Most images stay uncertain, or most fakes are real.
        """
        real, fake = _value(self.shares.uncertain_real), _value(self.shares.uncertain_fake)
        if self.shares.fnr is not None and (real + fake) / 2 >= _NEXT_TO_NOTHING:
            return (
                f"these thresholds decide next to nothing: {real:.0%} of the reals and {fake:.0%} of the fakes stay "
                "uncertain; allow larger shares, or choose a head that tells the two apart"
            )
        if (missed := _value(self.shares.fnr)) >= 0.5:
            return (
                f"{missed:.0%} of the fakes are called real: allow a larger --max-fpr, or choose a head that tells "
                "the two apart"
            )
        return ""


def needed(share: float) -> int:
    """Returns how many images a bound takes: with fewer, only calling none of them so keeps it.

    Raises:
        ValueError: not 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"a bound lies between 0 and 1, not at {share}")
    # From (n + 1) · share >= 1; the slack keeps 1 / 0.1 from counting as a little over 10.
    return ceil(1 / share - 1 - _SLACK)


def draw_thresholds(
    reals: NDArray[np.float32],
    fakes: NDArray[np.float32],
    *,
    max_fpr: float,
    max_fnr: float,
    strict_fnr: bool = False,
    low_before: float | None = None,
) -> Thresholds:
    """Thresholds under which at most `max_fpr` of reals are called fake and at most `max_fnr` of fakes real.

    Images between the two are uncertain. Where the classes lie so far apart that `low` would be above `high`, every
    border between the two keeps both bounds, and the one in the middle is taken: nothing is uncertain. With too few
    fakes to place `low` it stays at `low_before`, as far as `high` lets it.

    Args:
        reals: `(n,)` scores in [0, 1].
        fakes: `(m,)` scores; may be empty.
        max_fpr: bound of the share of reals called fake.
        max_fnr: bound of the share of fakes called real.
        strict_fnr: refuse where there are too few fakes.
        low_before: where `low` is now; None: nowhere that means anything for these scores, so too few fakes are
            refused.

    Raises:
        DatasetError: too few images for a bound, or so many reals at the highest score that no border keeps it.
        ValueError: a bound that is not between 0 and 1.
    """
    # Split conformal prediction (Vovk et al., 2005): the bound holds on average over such samples and for one further
    # image, if it and these are exchangeable; it assumes nothing about the scores' distribution.
    high = _high(np.sort(reals), max_fpr)
    if len(fakes) < needed(max_fnr):
        problem = _too_few("fakes called real", max_fnr, len(fakes), "generated")
        if strict_fnr or low_before is None:
            raise DatasetError(f"{problem}: label more, or allow a larger share")
        low = min(low_before, high)
        stays = "stays where it was" if low == low_before else "goes down with high and no further"
        return Thresholds(
            low, high, f"low {stays}, at {low:.4f}: {problem}", shares_at(reals, fakes, low, high), low_kept=True
        )
    low = _low(np.sort(fakes), max_fnr)
    note = ""
    if low >= high:
        # Any border between the two keeps both; the middle is furthest from either class.
        low = high = (low + high) / 2
        note = "both bounds hold with one border in the middle: nothing is uncertain"
    return Thresholds(low, high, note, shares_at(reals, fakes, low, high))


def shares_at(reals: NDArray[np.float32], fakes: NDArray[np.float32], low: float, high: float) -> Shares:
    """Returns what any thresholds do to these images."""
    real, fake = reals.astype(np.float64), fakes.astype(np.float64)
    return Shares(
        fpr=_share(real >= high),
        tpr=_share(fake >= high),
        fnr=_share(fake < low),
        uncertain_real=_share((real >= low) & (real < high)),
        uncertain_fake=_share((fake >= low) & (fake < high)),
    )


def _high(ordered: NDArray[np.float32], max_fpr: float) -> float:
    n = len(ordered)
    if n < needed(max_fpr):
        problem = _too_few("reals called fake", max_fpr, n, "real")
        raise DatasetError(f"{problem}: label more, or allow a larger share")
    # The rank of which at most `max_fpr` of all lie above; n + 1, since the next image is one of them.
    place = ceil((n + 1) * (1 - max_fpr) - _SLACK)
    # In float32, as scores are: that real is just below the border.
    border = np.nextafter(np.float32(ordered[place - 1]), np.float32(2))
    if border > 1:
        raise DatasetError(
            f"{int((ordered >= 1).sum())} of {n} real images have the highest score, 1: no border keeps the reals "
            f"called fake under {max_fpr:g}; choose another head, or retrain with these images"
        )
    return float(border)


def _low(ordered: NDArray[np.float32], max_fnr: float) -> float:
    # The same from below: at most `max_fnr` of fakes lie under this rank.
    place = floor((len(ordered) + 1) * max_fnr + _SLACK)
    return float(ordered[place - 1])


def _too_few(what: str, share: float, count: int, kind: str) -> str:
    there = "there is 1" if count == 1 else f"there are {count}"
    return f"to bound the {what} by {share:g} takes at least {needed(share)} {kind} images; {there}"


def _value(share: dict[str, float] | None) -> float:
    return 0.0 if share is None else share["value"]


def _share(hits: NDArray[np.bool_]) -> dict[str, float] | None:
    if len(hits) == 0:
        return None
    low, high = wilson(int(hits.sum()), len(hits))
    return {"value": float(hits.mean()), "low": low, "high": high}
