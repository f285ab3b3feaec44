"""Figures of a detector: pure functions of labels (0 real, 1 generated) and scores (higher = more likely generated).

One formula serves the figure and its bootstrap: both are computed from counts per distinct score, for one sample or
for hundreds of resamples at once. What a group cannot tell, such as the fake accuracy of reals, is None, never 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.data.datasets.examples import FAKE, REAL

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


Threshold = float | tuple[float, float]
"""`high`, or `(low, high)`: `score >= high` is fake, `score < low` real, between the two uncertain."""

DECISIONS: Final = ("real_accuracy", "fake_accuracy", "accuracy", "balanced_accuracy", "fpr", "fnr", "uncertain")
"""Figures at thresholds. Uncertain images are right in no accuracy, and no false alarm or miss either."""
RANKINGS: Final = ("ap", "auroc", "tpr_at_1pct_fpr", "tpr_at_5pct_fpr", "eer", "ece", "brier")
"""Figures of the scores themselves."""
FIGURES: Final = (*DECISIONS, *RANKINGS)
CALIBRATION_BINS: Final = 15
LEVEL: Final = 0.95

_RESAMPLED_AT_A_TIME: Final = 2_000_000
_CLASS_SHARES: Final = {"real_accuracy": REAL, "fake_accuracy": FAKE, "fpr": REAL, "fnr": FAKE}


@dataclass(frozen=True, slots=True)
class Bin:
    """Images whose scores lie in one of the equal parts of [0, 1]."""

    low: float
    high: float
    n: int
    mean_score: float
    fakes: float
    """Share of them that is generated."""


def figures(
    labels: NDArray[np.int8], scores: NDArray[np.float32], *, threshold: Threshold = 0.5
) -> dict[str, float | None]:
    """Every figure of one group of images.

    - `real_accuracy`, `fake_accuracy`: share of that class that is called so; `accuracy`: of all;
      `balanced_accuracy`: mean of the two; `fpr`: reals called fake; `fnr`: fakes called real; `uncertain`: neither.
    - `ap`: average precision, Σ (R_k - R_{k-1}) P_k, the fakes being positive; `auroc`: area under the ROC curve,
      ties counted half; `tpr_at_1pct_fpr`, `tpr_at_5pct_fpr`: highest share of fakes found at a threshold with at
      most so many false alarms, not interpolated; `eer`: where FPR and FNR are equal, linear between thresholds.
    - `ece`: Σ_b n_b / n · |mean score - share of fakes| over 15 equally wide bins of the score (Guo et al. 2017, of
      the score for "generated"); `brier`: mean squared difference of score and label.

    Args:
        labels: `(n,) int8`.
        scores: `(n,)` in [0, 1].
        threshold: where decisions are made.

    Returns:
        `n`, `n_real`, `n_fake` and the names of `FIGURES`; None where the group lacks a class that it takes.

    Raises:
        ValueError: shapes, labels or scores that are none.
    """
    sample = _counted(labels, scores)
    low, high = _borders(threshold)
    found = {name: _plain(values[0]) for name, values in _measure(sample, low, high, FIGURES).items()}
    n_real, n_fake = int(sample.real.sum()), int(sample.fake.sum())
    return {"n": n_real + n_fake, "n_real": n_real, "n_fake": n_fake, **found}


def intervals(
    labels: NDArray[np.int8],
    scores: NDArray[np.float32],
    *,
    threshold: Threshold = 0.5,
    names: Sequence[str] = FIGURES,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile intervals of the bootstrap, resampled within each class.

    Where all images of a class are right, or all wrong, no resample can differ, and the bootstrap's interval would
    be a point however few they are; nor where one class is all uncertain and the other never. Then these shares get
    the Wilson interval, and accuracies over both classes the one that is joined of the classes' (Zou & Donner 2008);
    a perfect area under the ROC curve gets the one that solves the variance of Hanley and McNeil for it (Newcombe
    2006, method 5), and a perfect equal error rate the larger class's share of errors. Of the other figures nothing
    can be said: they have none.

    Raises:
        ValueError: as `figures`, or fewer than one resample.
    """
    if resamples < 1:
        raise ValueError(f"{resamples} resamples: at least one is needed")
    sample = _counted(labels, scores)
    low, high = _borders(threshold)
    # The bootstrap assumes that images are independent; the numbers of reals and fakes are held as they are, since a
    # data set's mix of classes is chosen and not drawn.
    parts = [_measure(part, low, high, names) for part in _resamples(sample, resamples, seed)]
    found: dict[str, tuple[float, float] | None] = {}
    for name in names:
        values = np.concatenate([part[name] for part in parts])
        # A figure that some resample lacks has no distribution to take percentiles of.
        found[name] = None if np.isnan(values).any() else _percentiles(values)
    point = {name: float(values[0]) for name, values in _measure(sample, low, high, FIGURES).items()}
    return found | {name: one for name, one in _at_the_border(sample, point, found).items() if name in names}


def _at_the_border(
    sample: _Counts, point: dict[str, float], found: dict[str, tuple[float, float] | None]
) -> dict[str, tuple[float, float] | None]:
    """Intervals in the place of those that the bootstrap cannot give."""
    n = {REAL: int(sample.real.sum()), FAKE: int(sample.fake.sum())}
    # The shares of one class are binomial: Wilson's interval holds for them without resampling.
    shares = {name: (point[name], n[kind]) for name, kind in _CLASS_SHARES.items() if n[kind]}
    shares["uncertain"] = (point["uncertain"], n[REAL] + n[FAKE])
    new: dict[str, tuple[float, float] | None] = {
        name: wilson(round(share * size), size)
        for name, (share, size) in shares.items()
        if size and (share in {0.0, 1.0} or _is_point(found.get(name)))
    }
    if {"real_accuracy", "fake_accuracy"} & new.keys():
        new |= _joined(point, n)
    degenerate = {name for name in RANKINGS if _is_point(found.get(name))}
    new |= dict.fromkeys(degenerate)
    if "auroc" in degenerate and point["auroc"] in {0.0, 1.0}:
        new["auroc"] = _auroc_limits(point["auroc"], n[REAL], n[FAKE])
    if "eer" in degenerate and point["eer"] == 0:
        new["eer"] = (0.0, wilson(0, min(n.values()))[1])
    return new


def _is_point(interval: tuple[float, float] | None) -> bool:
    return interval is not None and interval[0] == interval[1]


def _joined(point: dict[str, float], n: dict[int, int]) -> dict[str, tuple[float, float] | None]:
    """Of accuracies over both classes, by the method of variance estimates recovery."""
    classes = {REAL: "real_accuracy", FAKE: "fake_accuracy"}
    limits = {kind: wilson(round(point[name] * n[kind]), n[kind]) for kind, name in classes.items() if n[kind]}
    total = sum(n.values())
    weightings = {"accuracy": {kind: n[kind] / total for kind in limits}}
    if len(limits) == len(classes):
        weightings["balanced_accuracy"] = dict.fromkeys(limits, 0.5)
    found: dict[str, tuple[float, float] | None] = {}
    for figure, weights in weightings.items():
        # Distances from estimate to limit add like standard errors, since the classes are independent samples; the
        # lower limit is made of lower distances alone, so that the interval stays skewed as its parts are.
        below = sqrt(sum((w * (point[classes[kind]] - limits[kind][0])) ** 2 for kind, w in weights.items()))
        above = sqrt(sum((w * (limits[kind][1] - point[classes[kind]])) ** 2 for kind, w in weights.items()))
        found[figure] = (max(0.0, point[figure] - below), min(1.0, point[figure] + above))
    return found


def _auroc_limits(value: float, reals: int, fakes: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of an area of 0 or 1: up to where it lies `z` standard errors away (Newcombe 2006, method 5)."""
    # Hanley and McNeil take scores of both classes to be exponential; Newcombe replaces both sample sizes by their
    # mean.
    wide = (reals + fakes) / 2 - 1

    def excess(area: float) -> float:
        spread = 1 + wide * ((1 - area) / (2 - area) + area / (1 + area))
        return abs(value - area) - z * sqrt(area * (1 - area) * spread / (reals * fakes))

    # Bisection: `excess` falls monotonically from the border inwards; 60 halvings are below one float's precision.
    inside, outside = value, 1 - value
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
    return (inside, 1.0) if value == 1 else (0.0, inside)


def calibration(
    labels: NDArray[np.int8], scores: NDArray[np.float32], *, bins: int = CALIBRATION_BINS
) -> tuple[Bin, ...]:
    """The bins of the `ece` that hold an image."""
    kinds = _checked(labels, scores)
    exact = scores.astype(np.float64)
    places = _bin_of(exact, bins)
    found = []
    for place in np.unique(places):
        inside = places == place
        found.append(
            Bin(
                low=float(place / bins),
                high=float((place + 1) / bins),
                n=int(inside.sum()),
                mean_score=float(exact[inside].mean()),
                fakes=float((kinds[inside] == FAKE).mean()),
            )
        )
    return tuple(found)


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95 % by default.

    Raises:
        ValueError: not 0 ≤ successes ≤ n, or n = 0.
    """
    if not (0 <= successes <= n and n > 0):
        raise ValueError(f"{successes} of {n} is no share")
    share = successes / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Samples of one group: how many reals and fakes have each of the distinct scores, highest first.

    `scores` is `(g,)`, the counts are `(samples, g)`, all float64.
    """

    scores: Floats
    real: Floats
    fake: Floats


def _checked(labels: NDArray[np.int8], scores: NDArray[np.float32]) -> NDArray[np.int8]:
    kinds = np.asarray(labels)
    if kinds.ndim != 1 or np.shape(scores) != kinds.shape:
        raise ValueError(f"labels of shape {kinds.shape} and scores of shape {np.shape(scores)} do not go together")
    if not np.isin(kinds, (REAL, FAKE)).all():
        raise ValueError("labels must be 0 (real) or 1 (generated)")
    if not bool(np.all((scores >= 0) & (scores <= 1))):
        raise ValueError("scores must be in [0, 1]")
    return kinds


def _borders(threshold: Threshold) -> tuple[float, float]:
    low, high = threshold if isinstance(threshold, tuple) else (threshold, threshold)
    if not low <= high:
        raise ValueError(f"low {low} is above high {high}")
    return low, high


def _counted(labels: NDArray[np.int8], scores: NDArray[np.float32]) -> _Counts:
    kinds = _checked(labels, scores)
    if len(kinds) == 0:
        return _Counts(np.zeros(1), np.zeros((1, 1)), np.zeros((1, 1)))
    # Negated, so that `unique` sorts from the highest score down: distinct is (g,), place (n,).
    distinct, place = np.unique(-scores.astype(np.float64), return_inverse=True)
    real, fake = (
        np.bincount(place[kinds == kind], minlength=len(distinct)).astype(np.float64)[None] for kind in (REAL, FAKE)
    )
    return _Counts(-distinct, real, fake)


def _resamples(sample: _Counts, resamples: int, seed: int) -> Iterator[_Counts]:
    """Bootstrap samples, some at a time.

    Drawing n images with replacement and counting their scores is one multinomial draw over the distinct scores.
    """
    # One stream each, so that the draws of a class are the same however large the other is.
    rng_real, rng_fake = (np.random.default_rng(one) for one in np.random.SeedSequence(seed).spawn(2))
    # Counts of (samples, g) float64: 16 MB at most are in memory for each class.
    step = max(1, _RESAMPLED_AT_A_TIME // max(1, len(sample.scores)))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        yield _Counts(
            sample.scores, _redrawn(rng_real, sample.real[0], count), _redrawn(rng_fake, sample.fake[0], count)
        )


def _redrawn(rng: Generator, counts: Floats, times: int) -> Floats:
    n = int(counts.sum())
    if n == 0:
        return np.zeros((times, len(counts)))
    return rng.multinomial(n, counts / n, size=times).astype(np.float64)


def _measure(counts: _Counts, low: float, high: float, names: Sequence[str]) -> dict[str, Floats]:
    """Each figure for each sample, `(samples,)`; NaN where it has none."""
    found = _decisions(counts, low, high)
    if set(names) - found.keys():
        found |= _curve_figures(counts) | _probability_figures(counts)
    return {name: found[name] for name in names}


def _decisions(counts: _Counts, low: float, high: float) -> dict[str, Floats]:
    # (g,) masks over the distinct scores; the sums below are (samples,).
    below, above = counts.scores < low, counts.scores >= high
    reals, fakes = counts.real.sum(axis=1), counts.fake.sum(axis=1)
    true_real, false_real = counts.real[:, below].sum(axis=1), counts.fake[:, below].sum(axis=1)
    true_fake, false_fake = counts.fake[:, above].sum(axis=1), counts.real[:, above].sum(axis=1)
    real_accuracy, fake_accuracy = _share(true_real, reals), _share(true_fake, fakes)
    decided = true_real + false_real + true_fake + false_fake
    return {
        "real_accuracy": real_accuracy,
        "fake_accuracy": fake_accuracy,
        "accuracy": _share(true_real + true_fake, reals + fakes),
        "balanced_accuracy": (real_accuracy + fake_accuracy) / 2,
        "fpr": _share(false_fake, reals),
        "fnr": _share(false_real, fakes),
        "uncertain": _share(reals + fakes - decided, reals + fakes),
    }


def _curve_figures(counts: _Counts) -> dict[str, Floats]:
    # (samples, g): fakes found, and reals called fake, if the threshold were at each distinct score.
    hits, alarms = np.cumsum(counts.fake, axis=1), np.cumsum(counts.real, axis=1)
    recall = _share(hits, counts.fake.sum(axis=1)[:, None])
    # (samples, g + 1): the curve begins at (0, 0), a threshold above all scores.
    tpr, fpr = (np.pad(one, ((0, 0), (1, 0))) for one in (recall, _share(alarms, counts.real.sum(axis=1)[:, None])))
    # A resample may lack the highest scores: 0 / 0 there, where recall does not rise and nothing is counted.
    precision = np.nan_to_num(_share(hits, hits + alarms))
    # (samples,): NaN without one of the classes, 1 else; multiplied in, it blanks every figure of the curve.
    both = np.where(np.isnan(tpr[:, -1] + fpr[:, -1]), np.nan, 1.0)
    return {
        "ap": both * np.sum(np.diff(tpr, axis=1) * precision, axis=1),
        "auroc": both * np.sum(np.diff(fpr, axis=1) * (tpr[:, 1:] + tpr[:, :-1]) / 2, axis=1),
        "tpr_at_1pct_fpr": both * np.where(fpr <= 0.01, tpr, 0.0).max(axis=1),
        "tpr_at_5pct_fpr": both * np.where(fpr <= 0.05, tpr, 0.0).max(axis=1),
        "eer": both * _equal_error(np.nan_to_num(tpr), np.nan_to_num(fpr)),
    }


def _equal_error(tpr: Floats, fpr: Floats) -> Floats:
    """Returns where fpr = 1 - tpr on the polygon through the points, which lead from (0, 0) to (1, 1)."""
    # From -1 at (0, 0) to 1 at (1, 1), and never falling: one crossing.
    excess = fpr + tpr - 1
    after = np.maximum(1, np.argmax(excess >= 0, axis=1))
    rows = np.arange(len(excess))
    before = after - 1
    rise = excess[rows, after] - excess[rows, before]
    part = np.divide(-excess[rows, before], rise, out=np.zeros(len(excess)), where=rise > 0)
    return np.asarray(fpr[rows, before] + part * (fpr[rows, after] - fpr[rows, before]))


def _probability_figures(counts: _Counts) -> dict[str, Floats]:
    n = (counts.real + counts.fake).sum(axis=1)
    # (samples, g) @ (g,): the label of a real is 0, of a fake 1.
    squares = counts.real @ counts.scores**2 + counts.fake @ (1 - counts.scores) ** 2
    # (g, bins): which bin each distinct score is in; the products below are (samples, bins).
    member = (_bin_of(counts.scores, CALIBRATION_BINS)[:, None] == np.arange(CALIBRATION_BINS)).astype(np.float64)
    claimed = ((counts.real + counts.fake) * counts.scores) @ member
    return {"brier": _share(squares, n), "ece": _share(np.abs(claimed - counts.fake @ member).sum(axis=1), n)}


def _bin_of(scores: Floats, bins: int) -> NDArray[np.int64]:
    # A score of 1 belongs to the last bin.
    return np.minimum((scores * bins).astype(np.int64), bins - 1)


def _share(part: Floats, whole: Floats) -> Floats:
    part, whole = np.broadcast_arrays(part, whole)
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0))


def right(labels: NDArray[np.int8], scores: NDArray[np.float32], threshold: Threshold) -> NDArray[np.bool_]:
    """`(n,)`: which images are judged rightly; an uncertain one is not.

    Raises:
        ValueError: as `figures`.
    """
    kinds = _checked(labels, scores)
    low, high = _borders(threshold)
    exact = np.asarray(scores).astype(np.float64)
    return np.where(kinds == REAL, exact < low, exact >= high)


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
