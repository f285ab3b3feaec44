from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from code_worker.errors import DatasetError
from code_worker.training.evaluation.thresholds import draw_thresholds, needed, shares_at

EMPTY = np.empty(0, np.float32)


def scores(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def beta(n: int, seed: int, a: float, b: float) -> NDArray[np.float32]:
    return np.random.default_rng(seed).beta(a, b, n).astype(np.float32)


@pytest.mark.parametrize(("share", "images"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (0.001, 999), (1 / 3, 2)])
def test_a_bound_takes_so_many_images_and_not_one_fewer(share: float, images: int) -> None:
    assert needed(share) == images
    reals = np.linspace(0, 0.9, images, dtype=np.float32)
    made = draw_thresholds(reals, EMPTY, max_fpr=share, max_fnr=0.05, low_before=0.5)
    assert made.high > reals.max()
    with pytest.raises(DatasetError, match=f"at least {images} real images; there (are|is) {images - 1}"):
        draw_thresholds(reals[1:], EMPTY, max_fpr=share, max_fnr=0.05, low_before=0.5)


@given(
    st.lists(st.floats(0, 0.9990234375, width=32), min_size=9, max_size=80),
    st.lists(st.floats(0, 1, width=32), max_size=80),
    st.sampled_from([0.1, 0.15, 0.25, 0.5]),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_both_bounds_hold_on_the_images_themselves(
    reals: list[float], fakes: list[float], max_fpr: float, max_fnr: float
) -> None:
    made = draw_thresholds(scores(reals), scores(fakes), max_fpr=max_fpr, max_fnr=max_fnr, low_before=0.5)
    assert 0 <= made.low <= made.high <= 1
    shares = shares_at(scores(reals), scores(fakes), made.low, made.high)
    assert shares.fpr is not None
    assert shares.fpr["value"] <= max_fpr
    if len(fakes) >= needed(max_fnr):
        assert shares.fnr is not None
        assert shares.fnr["value"] <= max_fnr
    assert made.shares == shares


@pytest.mark.parametrize("max_fpr", [0.05, 0.1, 0.2])
def test_a_further_image_is_a_false_alarm_no_more_often_than_allowed(max_fpr: float) -> None:
    """Over many draws of 60 reals and one more; the chance is (n + 1 - k) / (n + 1), whatever the distribution."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(4000):
        drawn = rng.beta(0.4, 3, 61).astype(np.float32)
        alarms += drawn[60] >= draw_thresholds(drawn[:60], EMPTY, max_fpr=max_fpr, max_fnr=0.05, low_before=0.5).high
    exact = np.floor(61 * max_fpr + 1e-9) / 61
    assert exact <= max_fpr
    # Five standard deviations either way: neither too many alarms, nor a border that gives detections away.
    assert alarms / 4000 == pytest.approx(exact, abs=5 * np.sqrt(exact / 4000))


def test_between_the_borders_is_what_neither_class_claims() -> None:
    reals, fakes = beta(400, 0, 2, 4), beta(300, 1, 4, 2)
    made = draw_thresholds(reals, fakes, max_fpr=0.02, max_fnr=0.02)
    assert made.low < made.high
    assert made.note == ""
    assert made.shares.uncertain_real is not None
    assert made.shares.uncertain_fake is not None
    assert made.shares.uncertain_real["value"] > 0.2
    assert made.shares.uncertain_fake["value"] > 0.2


def test_classes_that_lie_apart_need_no_band() -> None:
    reals, fakes = beta(200, 0, 1, 30), 1 - beta(200, 1, 1, 30)
    made = draw_thresholds(reals, fakes, max_fpr=0.01, max_fnr=0.05, low_before=0.5)
    assert made.low == made.high
    assert reals.max() < made.high < np.sort(fakes)[10]
    assert "one border in the middle" in made.note
    assert made.shares.fpr is not None
    assert made.shares.fpr["value"] == 0
    assert made.shares.fpr["high"] > 0.01, "none of 200 is no proof of none"


def test_without_enough_fakes_the_border_of_the_reals_stays_where_it_was() -> None:
    reals, fakes = beta(200, 0, 2, 8), scores([0.2])
    made = draw_thresholds(reals, fakes, max_fpr=0.05, max_fnr=0.05, low_before=0.25)
    assert (made.low, made.high > 0.25) == (0.25, True)
    assert made.low_kept
    assert "low stays where it was, at 0.2500" in made.note
    assert "takes at least 19 generated images; there is 1" in made.note
    above = draw_thresholds(reals, fakes, max_fpr=0.05, max_fnr=0.05, low_before=0.99)
    assert above.low == above.high == made.high
    assert "goes down with high and no further" in above.note


@pytest.mark.parametrize(("strict", "before"), [(True, 0.5), (False, None)])
def test_without_enough_fakes_nor_a_border_to_keep_it_is_refused(*, strict: bool, before: float | None) -> None:
    with pytest.raises(DatasetError, match="at least 19 generated images; there are 2: label more"):
        draw_thresholds(
            beta(200, 0, 2, 8),
            scores([0.2, 0.9]),
            max_fpr=0.05,
            max_fnr=0.05,
            strict_fnr=strict,
            low_before=before,
        )


def test_thresholds_that_decide_next_to_nothing_say_so() -> None:
    same = draw_thresholds(beta(300, 0, 2, 2), beta(300, 1, 2, 2), max_fpr=0.05, max_fnr=0.05)
    assert "decide next to nothing: 9" in same.warning
    missed = draw_thresholds(beta(300, 0, 2, 2), beta(10, 1, 2, 2), max_fpr=0.01, max_fnr=0.05, low_before=0.99)
    assert "of the fakes are called real" in missed.warning
    useful = draw_thresholds(beta(300, 0, 2, 8), beta(300, 1, 8, 2), max_fpr=0.05, max_fnr=0.05)
    assert useful.warning == ""


def test_reals_at_the_highest_score_cannot_be_kept_out_by_any_border() -> None:
    reals = scores([0.0] * 90 + [1.0] * 10)
    with pytest.raises(DatasetError, match="10 of 100 real images have the highest score"):
        draw_thresholds(reals, EMPTY, max_fpr=0.05, max_fnr=0.05, low_before=0.5)
    assert draw_thresholds(reals, EMPTY, max_fpr=0.15, max_fnr=0.05, low_before=0.5).high <= 1


def test_ties_are_not_counted_on_the_wrong_side() -> None:
    reals = scores([0.1] * 50 + [0.6] * 50)
    made = draw_thresholds(reals, EMPTY, max_fpr=0.1, max_fnr=0.05, low_before=0.5)
    assert made.high > np.float32(0.6)
    assert made.shares.fpr is not None
    assert made.shares.fpr["value"] == 0


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_a_bound_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        draw_thresholds(beta(50, 0, 1, 1), EMPTY, max_fpr=share, max_fnr=0.05, low_before=0.5)
