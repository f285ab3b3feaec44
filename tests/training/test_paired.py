"""Exact tests and limits for paired judgements, beside naive enumeration and by what they promise."""

from __future__ import annotations

from itertools import product
from math import comb
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pytest

from code_worker.training.gate.paired import (
    Stratum,
    auroc_limits,
    better_p,
    count_limits,
    detectable_loss,
    difference_limits,
    effective_number,
    images_needed,
    joint_error,
    proportion_limits,
    proven_loss,
    signed_groups,
    tarone_level,
    worse_p,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


@pytest.mark.parametrize(("gains", "losses"), [(0, 0), (0, 1), (3, 5), (5, 3), (1, 16)])
def test_the_p_value_of_harm_counts_coins(gains: int, losses: int) -> None:
    m = gains + losses
    assert worse_p(gains, losses) == pytest.approx(sum(comb(m, k) for k in range(losses, m + 1)) / 2**m)
    # With one stratum the test of a gain is the same one, looked at from the other side.
    assert better_p([Stratum(losses, gains)]) == pytest.approx(worse_p(gains, losses))


@pytest.mark.parametrize(
    "strata",
    [
        (Stratum(4, 1, 0.5), Stratum(2, 2, 0.25)),
        (Stratum(3, 0, 1 / 30), Stratum(0, 3, 1 / 30)),
        (Stratum(0, 0, 0.1), Stratum(5, 1, 0.3)),
    ],
)
def test_the_p_value_of_a_weighted_gain_enumerates_every_sign(strata: tuple[Stratum, ...]) -> None:
    weights = [one.weight for one in strata for _ in range(one.discordant)]
    observed = sum(one.weight * (one.gains - one.losses) for one in strata)
    sums = [
        sum(sign * weight for sign, weight in zip(signs, weights, strict=True))
        for signs in product((-1, 1), repeat=len(weights))
    ]
    assert better_p(strata) == pytest.approx(np.mean([value >= observed - 1e-12 for value in sums]))


def test_tests_that_cannot_fail_do_not_cost_the_others_their_level() -> None:
    assert tarone_level([], 0.05) == 0.05
    assert tarone_level([3, 4, 2], 0.05) == 0.05, "none can reach it"
    assert tarone_level([10, 3, 4, 2], 0.05) == 0.05, "one can"
    assert tarone_level([10, 10, 3], 0.05) == 0.025
    assert tarone_level([20] * 20, 0.05) == pytest.approx(0.05 / 20), "Bonferroni where all can"


def test_the_level_over_many_groups_is_kept() -> None:
    """Of equal releases over twenty generators, at most a share of `error` is called worse on any; here is 5 %."""
    rng = np.random.default_rng(0)
    worse = 0
    for _ in range(2000):
        losses, gains = rng.binomial(100, 0.03, size=(2, 20))
        level = tarone_level(list(losses + gains), 0.05)
        worse += any(worse_p(int(g), int(loss)) <= level for g, loss in zip(gains, losses, strict=True))
    # The exact count of 2,000 trials of chance 5 % exceeds 130 once in 1,000.
    assert worse <= 130


def test_limits_of_a_share_are_exact_at_its_ends() -> None:
    low, high = proportion_limits(0, 20, 0.05)
    assert low == 0
    assert (1 - high) ** 20 == pytest.approx(0.05)
    low, high = proportion_limits(20, 20, 0.05)
    assert high == 1
    assert low**20 == pytest.approx(0.05)
    assert proportion_limits(0, 0, 0.05) == (0.0, 1.0)


def test_limits_of_a_difference_are_those_of_the_losses_where_nothing_is_gained() -> None:
    changes = np.array([-1] * 2 + [0] * 98, np.int8)
    low, high = difference_limits(changes, np.full(100, 0.01), 0.05)
    assert low == pytest.approx(-proportion_limits(2, 100, 0.05)[1])
    assert high > -0.02
    assert difference_limits(np.zeros(0, np.int8), np.zeros(0), 0.05) == (-1.0, 1.0)


@pytest.mark.parametrize("truth", [(0.02, 0.02), (0.0, 0.02), (0.05, 0.07)])
@pytest.mark.parametrize("sizes", [(100,), (300,), (20, 60, 200)])
def test_a_limit_errs_no_more_often_than_it_says(truth: tuple[float, float], sizes: tuple[int, ...]) -> None:
    """Gains and losses of these chances, in groups that are weighted alike, against the mean change they have."""
    rng = np.random.default_rng(1)
    weights = np.concatenate([np.full(n, 1 / (len(sizes) * n)) for n in sizes])
    error, missed, trials = 0.1, 0, 1000
    for _ in range(trials):
        drawn = rng.random(weights.size)
        changes = np.where(drawn < truth[0], 1, np.where(drawn < sum(truth), -1, 0)).astype(np.int8)
        low, _ = difference_limits(changes, weights, error)
        missed += low > truth[0] - truth[1]
    # The exact count of 1,000 trials of chance 10 % exceeds 130 once in 1,000.
    assert missed <= 130


def test_the_loss_that_would_show_is_the_one_that_shows() -> None:
    level, margin = 0.01, 0.02
    assert detectable_loss(6, level, margin) is None, "seven losses are the fewest with a p-value below 1 %"
    loss = detectable_loss(100, level, margin)
    assert loss is not None
    rng = np.random.default_rng(2)
    found = np.mean(
        [
            worse_p(0, int(lost)) <= level and count_limits(0, int(lost), 100, level)[1] < -margin
            for lost in rng.binomial(100, loss, 4000)
        ]
    )
    assert found == pytest.approx(0.8, abs=0.025), "four standard errors of 4,000 trials"


def test_the_images_that_would_tell_do_so() -> None:
    n = images_needed(0.0, 0.02, 0.05)
    assert n is not None
    assert 0.98**n <= 0.05 < 0.98 ** (n / 1.2)
    assert images_needed(0.5, 0.0001, 0.05) is None


def test_the_limits_of_an_area_are_delongs() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat(np.array([0, 1], np.int8), [30, 40])
    # Rounded, so that some tie.
    one, two = (np.round(labels * shift + rng.normal(size=70), 1).astype(np.float32) for shift in (1.0, 1.5))

    def wins(scores: NDArray[np.float32]) -> NDArray[np.float64]:
        real, fake = scores[labels == 0][:, None], scores[labels == 1][None]
        return np.asarray((fake > real) + 0.5 * (fake == real))

    change = wins(two) - wins(one)
    spread = np.sqrt(change.mean(1).var(ddof=1) / 30 + change.mean(0).var(ddof=1) / 40)
    limits = auroc_limits(labels, one, two, 0.025)
    assert limits == pytest.approx((change.mean() - 1.959964 * spread, change.mean() + 1.959964 * spread), abs=1e-6)
    assert auroc_limits(labels[:31], one[:31], two[:31], 0.025) is None, "one fake has no variance"


def test_an_equal_area_is_seldom_proven_to_be_smaller() -> None:
    rng = np.random.default_rng(5)
    labels = np.repeat(np.array([0, 1], np.int8), 60)
    below = 0
    for _ in range(1000):
        shared = labels * 2 + rng.normal(size=120)
        one, two = ((shared + rng.normal(size=120)).astype(np.float32) for _ in range(2))
        limits = auroc_limits(labels, one, two, 0.05)
        below += limits is not None and limits[1] < 0
    # The exact count of 1,000 trials of chance 5 % exceeds 72 once in 1,000; the limits are approximate.
    assert below <= 72


def test_a_loss_is_proven_by_test_and_limit() -> None:
    assert proven_loss(Stratum(0, 4), 40, 0.05) == 0.0, "four coins fall so once in sixteen"
    assert proven_loss(Stratum(0, 10), 40, 0.05) == -count_limits(0, 10, 40, 0.05)[1] > 0.1
    assert proven_loss(Stratum(10, 0), 40, 0.05) == 0.0


def test_groups_are_tested_by_their_signs_and_limited_by_their_number() -> None:
    changes = np.array([1, 1, -1, 0, 1, -1, 1], np.int8)
    groups = np.array([0, 0, 0, 1, 2, 3, 4])
    strata = signed_groups(changes, np.full(7, 1 / 7), groups)
    assert [(one.gains, one.losses) for one in strata] == [(3, 1)]
    assert signed_groups(changes[:2], np.full(2, 0.5), groups[:2]) == [Stratum(1, 0, 1.0)]
    nothing = np.zeros(100, np.int8)
    fives = np.arange(100) // 5
    assert effective_number(nothing, np.full(100, 0.01), fives) == pytest.approx(20)
    low, _ = difference_limits(nothing, np.full(100, 0.01), 0.05, fives)
    assert low == pytest.approx(-proportion_limits(0, 20, 0.05)[1])


def test_equal_detectors_seldom_look_better_on_groups_that_agree() -> None:
    rng = np.random.default_rng(6)
    groups, weights = np.arange(200) // 4, np.full(200, 1 / 200)
    found = 0
    for _ in range(1000):
        changes = rng.choice(np.array([-1, 0, 1], np.int8), size=50, p=[0.1, 0.8, 0.1])[groups]
        found += better_p(signed_groups(changes, weights, groups)) <= 0.05
    # The exact count of 1,000 trials of chance 5 % exceeds 72 once in 1,000.
    assert found <= 72


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 1.0])
def test_two_limits_err_together_as_seldom_as_they_may(correlation: float) -> None:
    each = joint_error(0.05, correlation)
    rng = np.random.default_rng(7)
    shared, *own = rng.normal(size=(3, 200_000))
    limit = NormalDist().inv_cdf(each)
    both = [np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * one < limit for one in own]
    # Five standard errors of the share.
    assert np.mean(both[0] & both[1]) == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 200_000) ** 0.5)


def test_noise_hides_losses_that_would_show_without() -> None:
    without, beside = detectable_loss(100, 0.01, 0.02), detectable_loss(100, 0.01, 0.02, 5)
    assert without is not None
    assert beside is not None
    assert without < beside


def test_groups_of_many_weights_are_tested_as_coins_say() -> None:
    """1,500 records of one real and four fakes, some reals missing: products of all sums would fill the memory."""
    rng = np.random.default_rng(8)
    groups = np.concatenate([np.arange(1500), np.arange(6000) // 4])
    reals = np.arange(7500) < 1500
    stays = ~reals | (rng.random(7500) > 0.07)
    groups, reals = groups[stays], reals[stays]
    weights = np.where(reals, 0.5 / reals.sum(), 0.5 / (~reals).sum())
    changes = rng.choice(np.array([-1, 0, 1], np.int8), size=len(weights), p=[0.04, 0.92, 0.04])
    sums = np.bincount(groups, weights * changes)
    sums = sums[np.abs(sums) > 1e-12]
    drawn = np.abs(sums) @ (2.0 * rng.integers(0, 2, size=(len(sums), 100_000), dtype=np.int8) - 1)
    p = better_p(signed_groups(changes, weights, groups))
    assert 0.01 < p < 0.99
    # Five standard errors of the share.
    assert p == pytest.approx((drawn >= sums.sum() - 1e-12).mean(), abs=5 * (p * (1 - p) / 100_000) ** 0.5)
