"""Exact tests and intervals for two detectors that judged the same images: pure functions of counts and weights.

Each image contributes a change: +1 if only the second detector is right, -1 if only the first is, 0 if they agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2, sqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.data.datasets.examples import FAKE, REAL
from code_worker.training.evaluation.metrics import LEVEL, Threshold, right

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Changes = NDArray[np.int8]
    Weights = NDArray[np.float64]
    Groups = NDArray[np.int64]
    """`(n,)`: images of one number are of one group (a record, a post), and count as one."""


def shared_correlation(
    groups: NDArray[np.int64],
    parts: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    weights: Sequence[NDArray[np.float64]],
) -> float:
    """Highest correlation that the means of two parts can have by groups that both have images of.

    If images of a group always changed alike: the covariance of the means over the root of their variances.
    """
    size = int(groups.max()) + 1
    # (groups,): the weight that each group has in the mean of its part.
    one, other = (np.bincount(groups[part], some, size) for part, some in zip(parts, weights, strict=True))
    return min(1.0, float(one @ other / sqrt((one @ one) * (other @ other))))


_POWER: Final = 0.8
_GRID: Final = 840
"""Steps of the largest weight; the least number that 1 to 8 divide."""
_MOST_IMAGES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """Second model minus first on identical images, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Stratum:
    """Images of one kind, or groups of images, whose changes weigh the same.

    Attributes:
        gains: images that only the second detector judges rightly.
        losses: images that only the first does.
        weight: of one image.
    """

    gains: int
    losses: int
    weight: float = 1.0

    @property
    def discordant(self) -> int:
        """Images on which exactly one of the two is right."""
        return self.gains + self.losses


def counted(changes: Changes, weight: float = 1.0) -> Stratum:
    """Counts `(n,)` changes."""
    return Stratum(int((changes > 0).sum()), int((changes < 0).sum()), weight)


def worse_p(gains: int, losses: int) -> float:
    """One-sided p-value of "the second is no worse": the exact McNemar test.

    Of two detectors that are equally good each discordant image is a loss with probability 1/2, so that the losses
    are Binomial(gains + losses, 1/2) (McNemar 1947; the exact form is the sign test).
    """
    from scipy.special import betainc

    # P(Binomial(m, 1/2) >= k) is the distribution function of Beta(k, m - k + 1) at 1/2.
    return float(betainc(losses, gains + 1, 0.5)) if losses else 1.0


def proven_loss(changes: Stratum, n: int, level: float) -> float:
    """Loss of accuracy of one group that is proven at a level by the exact test and by the limit; 0 where none is."""
    if worse_p(changes.gains, changes.losses) > level:
        return 0.0
    return max(0.0, -count_limits(changes.gains, changes.losses, n, level)[1])


def better_p(strata: Sequence[Stratum]) -> float:
    """One-sided p-value of "the second is no better" for a weighted sum of changes over independent strata.

    Under that hypothesis the sign of each discordant image is a coin's: the distribution of
    `Σ weight · (gains - losses)` given the discordant images is that of independent binomials, computed by
    convolution. With one stratum this is the exact McNemar test.
    """
    from scipy.signal import convolve

    if not any(one.discordant for one in strata):
        return 1.0
    # Weights on a grid, so that sums are whole numbers: a test of the same kind, of weights a thousandth off at most.
    unit = max(one.weight for one in strata)
    whole = [max(1, round(_GRID * one.weight / unit)) for one in strata]
    chances, observed = np.ones(1), 0
    for weight, one in zip(whole, strata, strict=True):
        # Sums from -weight · m to weight · m in steps of 2 · weight, since a coin's two sides are two weights apart.
        own = np.zeros(2 * weight * one.discordant + 1)
        own[:: 2 * weight] = _coins(one.discordant)
        # Strata are independent: the distribution of a sum is the convolution. scipy chooses the FFT where it is
        # shorter, whose rounding can leave the sum slightly outside of [0, 1].
        chances = convolve(chances, own)
        observed += weight * (one.gains - one.losses)
    # The middle is a sum of 0.
    return float(min(1.0, max(0.0, chances[len(chances) // 2 + observed :].sum())))


def signed_groups(changes: Changes, weights: Weights, groups: Groups) -> list[Stratum]:
    """Groups of images as strata for `better_p`, by how much the change of a whole group weighs.

    Images of a group are no independent witnesses: a detector that finds a picture finds its copies. Of two detectors
    that are equally good a group's weighted sum of changes has either sign alike, whichever traits its images share
    (a sign test over clusters; with ranks it is that of Datta & Satten, Biometrics 64, 2008, 501-507).
    """
    # (groups,): what each group lost or gained in all; one that balances out says nothing about a direction.
    sums = np.bincount(groups, weights * changes)
    # Rounding of sums of weights near 1 / n, not a change.
    sums = sums[np.abs(sums) > 1e-12]
    # To six digits of the largest: weights such as 2w and w + w are the same.
    sizes = np.round(np.abs(sums) / np.abs(sums).max(initial=1e-12), 6) * np.abs(sums).max(initial=1e-12)
    return [
        Stratum(int((sums[sizes == size] > 0).sum()), int((sums[sizes == size] < 0).sum()), float(size))
        for size in np.unique(sizes)
    ]


def _coins(n: int) -> NDArray[np.float64]:
    """`(n + 1,)`: chance of each number of heads among `n` coins."""
    from scipy.special import gammaln

    # By logarithms: binomial coefficients of some thousand images do not fit into a float.
    heads = np.arange(n + 1)
    return np.asarray(np.exp(gammaln(n + 1) - gammaln(heads + 1) - gammaln(n - heads + 1) - n * np.log(2)))


def tarone_level(discordant: Sequence[int], error: float) -> float:
    """Level of each test, so that the chance of any false alarm over all of them is at most `error`.

    Bonferroni's division by the number of tests, of which those do not count that could not reach the level even if
    all their changes were losses: `m` discordant images have no p-value below `2**-m` (Tarone, Biometrics 46, 1990,
    515-522).

    Args:
        discordant: images on which exactly one detector is right, for each test.
        error: familywise error.

    Returns:
        `error / k` with the smallest `k` such that at most `k` tests can reach it.
    """
    for k in range(1, len(discordant) + 1):
        # Tests that could not reach the level cannot raise a false alarm, so they need no share of the error.
        if sum(2.0**-m <= error / k for m in discordant) <= k:
            return error / k
    return error


def proportion_limits(part: float, whole: float, error: float) -> tuple[float, float]:
    """One-sided lower and upper Clopper-Pearson limits of a proportion, each with at most `error`.

    Counts may be fractions of images, as weighted ones are.
    """
    from scipy.special import betaincinv

    if whole <= 0:
        return 0.0, 1.0
    # The limits are quantiles of Beta distributions; betaincinv takes fractions, where a binomial would need counts.
    low = float(betaincinv(part, whole - part + 1, error)) if part > 0 else 0.0
    high = float(betaincinv(part + 1, whole - part, 1 - error)) if part < whole else 1.0
    return low, high


def difference_limits(
    changes: Changes, weights: Weights, error: float, groups: Groups | None = None
) -> tuple[float, float]:
    """Lower and upper limit of the mean change, each with at most about `error`.

    The weighted shares of gains and of losses get Clopper-Pearson limits, at the effective number of images, and are
    joined by the method of variance estimates recovery (Zou & Donner, Statistics in Medicine 27, 2008, 1693-1702):
    without a gain the lower limit is exactly minus the upper limit of the share of losses, so that agreement on few
    images is no proof of equality.

    Args:
        changes: `(n,)` of -1, 0, 1.
        weights: `(n,)`, positive, of sum 1.
        error: of each limit.
        groups: which images belong together; None: each is by itself.

    Returns:
        Limits in [-1, 1]; without images all of it.
    """
    if len(changes) == 0:
        return -1.0, 1.0
    gained, lost = float(weights[changes > 0].sum()), float(weights[changes < 0].sum())
    n = effective_number(changes, weights, groups)
    return count_limits(gained * n, lost * n, n, error)


def count_limits(gains: float, losses: float, n: float, error: float) -> tuple[float, float]:
    """The same of images that weigh alike, by how many of `n` were gained and lost."""
    if n <= 0:
        return -1.0, 1.0
    gained, lost = gains / n, losses / n
    low_gain, high_gain = proportion_limits(gains, n, error)
    low_loss, high_loss = proportion_limits(losses, n, error)
    # Gains and losses exclude each other: their covariance, -gained · lost / n, is left out. At shares of a few per
    # cent it would widen the interval by less than the exact limits are too wide already.
    low = gained - lost - sqrt((gained - low_gain) ** 2 + (high_loss - lost) ** 2)
    high = gained - lost + sqrt((high_gain - gained) ** 2 + (lost - low_loss) ** 2)
    return max(-1.0, low), min(1.0, high)


def effective_number(changes: Changes, weights: Weights, groups: Groups | None = None) -> float:
    """Number of independent, equally weighted images that tell as much (Kish 1965), at least about.

    By all of them or by the discordant ones, whichever are fewer. Images of a group count as if they always agreed.
    """
    by_group = np.arange(len(changes)) if groups is None else groups
    # (groups,): images of a group are counted as fully correlated, the most that they can be.
    whole = np.bincount(by_group, weights)
    changed = np.bincount(by_group[changes != 0], weights[changes != 0])
    return min(float(one.sum() / (one**2).sum()) for one in (whole, changed) if one.any())


def joint_error(error: float, correlation: float) -> float:
    """Error of each of two limits, so that both err at once with a chance of `error`.

    Limits whose errors are normal and correlated miss both with the chance `P(Z1 < z, Z2 < z)` of two standard
    normals, which is `Φ(z) - 2 T(z, √((1 - ρ) / (1 + ρ)))` with Owen's T (Annals of Mathematical Statistics 27,
    1956, 1075-1090): √error where they have nothing in common, `error` where they are the same.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri, owens_t

    # A correlation of 1 gives a spread of 0, where T(z, 0) is 0; of 0 a spread of 1, where 2 T(z, 1) is Φ(z)(1 -
    # Φ(z)).
    spread = sqrt((1 - correlation) / (1 + correlation))
    if spread in {0.0, 1.0}:
        return sqrt(error) if spread else error
    # The chance that both err rises with the error of each: one root, between the two extremes.
    return float(brentq(lambda each: each - 2 * owens_t(ndtri(each), spread) - error, error, sqrt(error)))


def paired_difference(
    labels: NDArray[np.int8],
    scores_a: NDArray[np.float32],
    scores_b: NDArray[np.float32],
    *,
    threshold_a: Threshold = 0.5,
    threshold_b: Threshold = 0.5,
) -> dict[str, Difference | None]:
    """Returns how much better b decides than a on the very same images, with 95 % intervals (`difference_limits`).

    Returns:
        `accuracy`, `balanced_accuracy`, `real_accuracy`, `fake_accuracy`; None where a class is lacking.

    Raises:
        ValueError: as `metrics.figures`.
    """
    changes = right(labels, scores_b, threshold_b).astype(np.int8) - right(labels, scores_a, threshold_a)
    real, fake = labels == REAL, labels == FAKE
    # Weights (n,) of sum 1, half of it on each class.
    both = real / max(1, 2 * real.sum()) + fake / max(1, 2 * fake.sum())
    groups = {"accuracy": real | fake, "real_accuracy": real, "fake_accuracy": fake}
    found = {name: _difference(changes[of], np.full(of.sum(), 1 / max(1, of.sum()))) for name, of in groups.items()}
    return found | {"balanced_accuracy": _difference(changes, both) if real.any() and fake.any() else None}


def _difference(changes: Changes, weights: Weights) -> Difference | None:
    if len(changes) == 0:
        return None
    # Shares of images: a sum of weights would miss 1 by its last bit.
    value = round(float(weights @ changes), 12)
    return Difference(value, *difference_limits(changes, weights, (1 - LEVEL) / 2))


def auroc_limits(
    labels: NDArray[np.int8], scores_a: NDArray[np.float32], scores_b: NDArray[np.float32], error: float
) -> tuple[float, float] | None:
    """Lower and upper limit of how much larger b's area under the ROC curve is than a's on the very same images.

    The area is the mean over the reals, and over the fakes, of each image's placement: the share of the other class
    that it is ranked rightly against, ties counted half. The variance of the difference is that of the placements'
    differences, and the limits are normal ones (DeLong, DeLong & Clarke-Pearson, Biometrics 44, 1988, 837-845).

    Args:
        labels: `(n,)`, 0 real, 1 generated.
        scores_a: `(n,)`, of the first detector.
        scores_b: `(n,)`, of the second.
        error: of each limit.

    Returns:
        None with fewer than two images of a class, which have no variance.
    """
    from scipy.special import ndtri

    if min((labels == REAL).sum(), (labels == FAKE).sum()) < 2:
        return None
    both = zip(_placements(labels, scores_a), _placements(labels, scores_b), strict=True)
    by_class = [b - a for a, b in both]
    value = float(by_class[0].mean())
    # Reals and fakes are independent samples: the variances of their mean placements add.
    reach = float(ndtri(1 - error)) * sqrt(sum(float(one.var(ddof=1)) / len(one) for one in by_class))
    return max(-1.0, value - reach), min(1.0, value + reach)


def _placements(labels: NDArray[np.int8], scores: NDArray[np.float32]) -> tuple[NDArray[np.float64], ...]:
    """Of each real, and of each fake, the share of the other class that it is ranked rightly against.

    An image's rank among all less its rank in its class is the number of the other class below it (Sun & Xu, IEEE
    Signal Processing Letters 21, 2014, 1389-1393).
    """
    from scipy.stats import rankdata

    real, fake = scores[labels == REAL], scores[labels == FAKE]
    # Mid-ranks, so that ties count half; O(n log n) in the place of comparing all pairs.
    ranks = rankdata(np.concatenate([real, fake]))
    fakes_below = (ranks[: len(real)] - rankdata(real)) / len(fake)
    reals_below = (ranks[len(real) :] - rankdata(fake)) / len(real)
    return 1 - fakes_below, reals_below


@lru_cache(maxsize=1024)
def detectable_loss(images: int, level: float, margin: float, gains: int = 0) -> float | None:
    """Smallest loss of accuracy of which more than `margin` would be proven with a chance of 80 %.

    By `worse_p` at most `level` and the upper limit of the change below `-margin`, were so many images gained besides
    those that were lost.

    Returns:
        A share of the images; None where even the loss of all others would not be found.
    """
    from scipy.special import betaincinv

    # Fewer losses than this have no p-value at the level, not even without a gain.
    fewest = max(ceil(-log2(level)), gains + 1)
    proving = (k for k in range(fewest, images - gains + 1) if proven_loss(Stratum(gains, k), images, level) > margin)
    least = next(proving, None)
    if least is None:
        return None
    # P(Binomial(n, d) >= k) is the distribution function of Beta(k, n - k + 1) at d.
    return float(betaincinv(least, images - least + 1, _POWER)) - gains / images


def images_needed(discordant_share: float, margin: float, error: float) -> int | None:
    """Images of two equally good detectors at which `difference_limits` would show a loss below `margin`.

    Args:
        discordant_share: share of images on which exactly one is right, half of them gains.
        margin: loss that must be excluded.
        error: of the limit.

    Returns:
        The number, rounded up to two digits; None above a million.
    """
    n = 16.0
    while n <= _MOST_IMAGES:
        half = discordant_share / 2
        low_gain, _ = proportion_limits(half * n, n, error)
        _, high_loss = proportion_limits(half * n, n, error)
        if sqrt((half - low_gain) ** 2 + (high_loss - half) ** 2) < margin:
            return _rounded(n)
        # The limits have no closed form that could be solved for n; steps of 5 % are finer than what is shown.
        n *= 1.05
    return None


def _rounded(n: float) -> int:
    unit: int = 10 ** max(0, len(str(int(n))) - 2)
    return int(ceil(n / unit) * unit)
