from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from code_worker.training.evaluation.metrics import DECISIONS, FIGURES, calibration, figures, intervals, wilson
from code_worker.training.gate.paired import paired_difference

Sample = tuple[NDArray[np.int8], NDArray[np.float32]]

samples = st.lists(
    st.tuples(st.integers(0, 1), st.one_of(st.integers(0, 8).map(lambda k: k / 8), st.floats(0, 1, width=32))),
    min_size=1,
    max_size=60,
).map(lambda rows: (np.array([r[0] for r in rows], np.int8), np.array([r[1] for r in rows], np.float32)))
both_classes = samples.map(
    lambda one: (
        np.concatenate([one[0], np.array([0, 1], np.int8)]),
        np.concatenate([one[1], np.array([0.3, 0.6], np.float32)]),
    )
)


def drawn(n: int, seed: int = 0, apart: float = 0.3) -> Sample:
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(np.int8)
    return labels, np.clip(rng.normal(0.35 + apart * labels, 0.2), 0, 1).astype(np.float32)


def naive(labels: NDArray[np.int8], scores: NDArray[np.float32], low: float, high: float) -> dict[str, float]:
    """Every figure by loops over images and thresholds."""
    real = [float(s) for y, s in zip(labels, scores, strict=True) if y == 0]
    fake = [float(s) for y, s in zip(labels, scores, strict=True) if y == 1]
    points = [(0.0, 0.0)]
    for border in sorted({*real, *fake}, reverse=True):
        points.append((sum(s >= border for s in real) / len(real), sum(s >= border for s in fake) / len(fake)))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    ap, seen = 0.0, 0.0
    for border in sorted({*real, *fake}, reverse=True):
        hits, alarms = sum(s >= border for s in fake), sum(s >= border for s in real)
        ap += (hits / len(fake) - seen) * hits / (hits + alarms)
        seen = hits / len(fake)
    ece = 0.0
    for place in range(15):
        inside = [(y, float(s)) for y, s in zip(labels, scores, strict=True) if min(int(float(s) * 15), 14) == place]
        if inside:
            claimed = sum(s for _, s in inside) / len(inside)
            ece += len(inside) / len(labels) * abs(claimed - sum(y for y, _ in inside) / len(inside))
    return {
        "real_accuracy": sum(s < low for s in real) / len(real),
        "fake_accuracy": sum(s >= high for s in fake) / len(fake),
        "accuracy": (sum(s < low for s in real) + sum(s >= high for s in fake)) / len(labels),
        "balanced_accuracy": (sum(s < low for s in real) / len(real) + sum(s >= high for s in fake) / len(fake)) / 2,
        "fpr": sum(s >= high for s in real) / len(real),
        "fnr": sum(s < low for s in fake) / len(fake),
        "uncertain": sum(low <= s < high for s in [*real, *fake]) / len(labels),
        "ap": ap,
        "auroc": area,
        "tpr_at_1pct_fpr": max(tpr for fpr, tpr in points if fpr <= 0.01),
        "tpr_at_5pct_fpr": max(tpr for fpr, tpr in points if fpr <= 0.05),
        "eer": crossing(points),
        "ece": ece,
        "brier": sum((float(s) - y) ** 2 for y, s in zip(labels, scores, strict=True)) / len(labels),
    }


def crossing(points: list[tuple[float, float]]) -> float:
    for (fpr_a, tpr_a), (fpr_b, tpr_b) in pairwise(points):
        before, after = fpr_a + tpr_a - 1, fpr_b + tpr_b - 1
        if before < 0 <= after:
            return fpr_a + (fpr_b - fpr_a) * -before / (after - before)
    raise AssertionError("the curve ends at (1, 1)")


@given(both_classes, st.floats(0, 1), st.floats(0, 1))
def test_every_figure_is_that_of_the_naive_computation(sample: Sample, one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = figures(*sample, threshold=(low, high))
    assert set(found) == {"n", "n_real", "n_fake", *FIGURES}
    for name, value in naive(*sample, low, high).items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


@given(both_classes)
def test_figures_are_those_of_scikit_learn_where_it_has_them(sample: Sample) -> None:
    found = figures(*sample)
    labels, scores = sample[0], sample[1].astype(np.float64)
    assert found["ap"] == pytest.approx(average_precision_score(labels, scores))
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["brier"] == pytest.approx(brier_score_loss(labels, scores))
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert found["tpr_at_5pct_fpr"] == pytest.approx(tpr[fpr <= 0.05].max())


@given(both_classes)
def test_figures_stay_in_range_and_ignore_the_order(sample: Sample) -> None:
    found = figures(*sample)
    assert all(value is not None and 0 <= value <= 1 + 1e-12 for name, value in found.items() if name in FIGURES)
    order = np.random.default_rng(1).permutation(len(sample[0]))
    again = figures(sample[0][order], sample[1][order])
    assert again == pytest.approx(found, abs=1e-12)


@given(both_classes)
def test_ranking_figures_turn_over_with_labels_and_scores(sample: Sample) -> None:
    labels, scores = sample[0], np.round(sample[1] * 64) / 64
    here, mirrored = figures(labels, scores), figures((1 - labels).astype(np.int8), 1 - scores)
    for name in ("auroc", "eer", "brier"):
        assert here[name] == pytest.approx(mirrored[name], abs=1e-9)


def test_an_uncertain_image_is_right_nowhere_and_no_false_alarm() -> None:
    labels = np.array([0, 0, 1, 1], np.int8)
    scores = np.array([0.1, 0.5, 0.5, 0.9], np.float32)
    found = figures(labels, scores, threshold=(0.4, 0.6))
    assert (found["real_accuracy"], found["fake_accuracy"], found["accuracy"]) == (0.5, 0.5, 0.5)
    assert (found["fpr"], found["fnr"], found["uncertain"]) == (0.0, 0.0, 0.5)


@pytest.mark.parametrize("kind", [0, 1])
def test_one_class_has_no_figure_that_takes_two(kind: int) -> None:
    sample = np.full(5, kind, np.int8), np.linspace(0, 1, 5, dtype=np.float32)
    found, bounds = figures(*sample), intervals(*sample, resamples=20)
    of_one_class = {"accuracy", "uncertain", "ece", "brier"}
    of_one_class |= {"fake_accuracy", "fnr"} if kind else {"real_accuracy", "fpr"}
    assert {name for name in FIGURES if found[name] is not None} == of_one_class
    assert {name for name in FIGURES if bounds[name] is not None} == of_one_class


def test_no_image_has_no_figure() -> None:
    found = figures(np.empty(0, np.int8), np.empty(0, np.float32))
    assert (found["n"], found["n_real"], found["n_fake"]) == (0, 0, 0)
    assert {found[name] for name in FIGURES} == {None}


def test_perfect_and_hopeless_detectors_have_the_figures_of_the_textbook() -> None:
    labels = np.array([0, 0, 1, 1], np.int8)
    perfect = figures(labels, labels.astype(np.float32))
    assert [perfect[name] for name in ("ap", "auroc", "tpr_at_1pct_fpr", "eer", "ece", "brier")] == [1, 1, 1, 0, 0, 0]
    constant = figures(labels, np.full(4, 0.5, np.float32))
    assert (constant["auroc"], constant["ap"], constant["tpr_at_5pct_fpr"], constant["eer"]) == (0.5, 0.5, 0.0, 0.5)


@pytest.mark.parametrize(
    ("labels", "scores", "says"),
    [
        ([0, 2], [0.1, 0.2], "labels must be"),
        ([0, 1], [0.1, np.nan], "scores must be"),
        ([0, 1], [0.1, 1.2], "scores must be"),
        ([0, 1], [0.1], "do not go together"),
    ],
)
def test_what_is_no_sample_is_refused(labels: list[int], scores: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        figures(np.array(labels, np.int8), np.array(scores, np.float32))


def test_thresholds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="above high"):
        figures(*drawn(10), threshold=(0.6, 0.4))


def test_bins_of_the_calibration_hold_every_image_and_make_up_the_ece() -> None:
    labels, scores = drawn(500)
    bins = calibration(labels, scores)
    assert sum(one.n for one in bins) == 500
    assert all(one.low <= one.mean_score <= one.high for one in bins)
    ece = sum(one.n / 500 * abs(one.mean_score - one.fakes) for one in bins)
    assert figures(labels, scores)["ece"] == pytest.approx(ece)


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = drawn(150)
    once = intervals(*sample, resamples=100, seed=3)
    monkeypatch.setattr("code_worker.training.evaluation.metrics._RESAMPLED_AT_A_TIME", 1000)
    assert intervals(*sample, resamples=100, seed=3) == once, "how many are computed at a time changes nothing"
    assert intervals(*sample, resamples=100, seed=4) != once


def test_the_bootstrap_is_that_of_resampled_images() -> None:
    labels, scores = drawn(200, seed=5)
    rng = np.random.default_rng(0)
    rows = {kind: np.flatnonzero(labels == kind) for kind in (0, 1)}
    seen: dict[str, list[float]] = {"auroc": [], "ap": [], "accuracy": [], "ece": []}
    for _ in range(600):
        drawn_rows = np.concatenate([rng.choice(one, len(one)) for one in rows.values()])
        found = figures(labels[drawn_rows], scores[drawn_rows])
        for name, values in seen.items():
            values.append(found[name] or 0.0)
    ours = intervals(labels, scores, names=tuple(seen), resamples=2000)
    for name, values in seen.items():
        bounds = ours[name]
        assert bounds is not None
        spread = float(np.std(values))
        assert bounds == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.4 * spread), name


def test_intervals_cover_the_truth_about_as_often_as_they_claim() -> None:
    truth = figures(*drawn(200_000, seed=99))
    hits = dict.fromkeys(("auroc", "real_accuracy", "balanced_accuracy", "eer"), 0)
    for seed in range(150):
        found = intervals(*drawn(250, seed), names=tuple(hits), resamples=200, seed=seed)
        for name in hits:
            bounds, value = found[name], truth[name]
            assert bounds is not None
            assert value is not None
            hits[name] += bounds[0] <= value <= bounds[1]
    # Were the chance of a hit 0.95, fewer than 130 of 150 would be seen once in some 40,000 runs of this test.
    assert min(hits.values()) >= 130, hits


def test_all_right_is_no_certainty() -> None:
    labels = np.array([0] * 20 + [1] * 20, np.int8)
    found = intervals(labels, labels.astype(np.float32), names=DECISIONS, resamples=50)
    assert found["real_accuracy"] == pytest.approx(wilson(20, 20))
    assert found["fnr"] == pytest.approx(wilson(0, 20))
    assert wilson(20, 20)[0] == pytest.approx(0.8389, abs=1e-4)
    assert wilson(7, 20) == pytest.approx((0.1812, 0.5671), abs=1e-4)


@pytest.mark.parametrize("n", [5, 20, 200])
def test_a_perfect_result_has_an_interval_in_every_figure_or_none(n: int) -> None:
    labels = np.repeat([0, 1], n).astype(np.int8)
    found = intervals(labels, np.where(labels == 1, 0.9, 0.1).astype(np.float32), resamples=50)
    low, _ = wilson(n, n)
    assert found["accuracy"] == found["balanced_accuracy"] == pytest.approx((1 - (1 - low) / 2**0.5, 1.0))
    assert found["uncertain"] == pytest.approx(wilson(0, 2 * n))
    assert found["eer"] == pytest.approx(wilson(0, n))
    assert found["auroc"] is not None
    # Bounds of Newcombe (2006) for an area of 1: 20 + 20 images leave areas down to 0.9.
    assert found["auroc"][1] == 1
    assert {5: 0.6, 20: 0.85, 200: 0.98}[n] < found["auroc"][0] < 1
    assert [found[name] for name in ("ap", "tpr_at_1pct_fpr", "tpr_at_5pct_fpr", "brier", "ece")] == [None] * 5


def test_one_perfect_class_widens_what_is_joined_of_both() -> None:
    labels = np.repeat([0, 1], 20).astype(np.int8)
    scores = np.where(labels == 1, 0.9, 0.1).astype(np.float32)
    scores[:5] = 0.9
    found = intervals(labels, scores, names=("accuracy", "balanced_accuracy", "fake_accuracy"), resamples=50)
    assert found["fake_accuracy"] == pytest.approx(wilson(20, 20))
    for name in ("accuracy", "balanced_accuracy"):
        bounds = found[name]
        assert bounds is not None
        low, high = bounds
        assert 0.7 < low < 0.875 < high < 1


@pytest.mark.numeric
@settings(deadline=None)
@given(samples)
def test_no_interval_is_a_point_however_few_the_images_are(sample: Sample) -> None:
    for threshold in (0.5, (0.3, 0.7)):
        found = intervals(*sample, threshold=threshold, resamples=100)
        assert {name for name, one in found.items() if one is not None and one[0] == one[1]} == set()


def test_a_class_that_is_all_uncertain_leaves_the_share_of_both_an_interval() -> None:
    labels, scores = np.array([0, 1, 1], np.int8), np.array([0.1, 0.5, 0.5], np.float32)
    found = intervals(labels, scores, threshold=(0.3, 0.7), names=["uncertain"])
    assert found["uncertain"] == wilson(2, 3)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_no_share_has_no_interval(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson(successes, n)


def test_a_paired_difference_is_that_of_the_figures_and_changes_sign_with_the_models() -> None:
    labels, first = drawn(400)
    second = drawn(400, seed=0, apart=0.3)[1] * np.float32(0.9)
    there = paired_difference(labels, first, second, threshold_b=(0.4, 0.5))
    back = paired_difference(labels, second, first, threshold_a=(0.4, 0.5))
    a, b = figures(labels, first), figures(labels, second, threshold=(0.4, 0.5))
    for name, difference in there.items():
        mirrored, before, after = back[name], a[name], b[name]
        assert difference is not None
        assert mirrored is not None
        assert before is not None
        assert after is not None
        assert difference.value == pytest.approx(after - before)
        assert difference.low <= difference.value <= difference.high
        assert mirrored.value == pytest.approx(-difference.value)


def test_identical_models_differ_by_nothing() -> None:
    labels, scores = drawn(100)
    found = paired_difference(labels, scores, scores)["balanced_accuracy"]
    assert found is not None
    assert found.value == 0
    assert -0.06 < found.low < -0.03, "on a hundred images a difference of a few points is not excluded"
    assert found.high == -found.low


def test_pairing_cancels_what_is_hard_for_both() -> None:
    labels, first = drawn(600, seed=2)
    second = first.copy()
    changed = np.flatnonzero((labels == 1) & (first < 0.5))[:12]
    second[changed] = 0.9
    found = paired_difference(labels, first, second)["fake_accuracy"]
    alone = intervals(labels, first, names=("fake_accuracy",))["fake_accuracy"]
    assert found is not None
    assert alone is not None
    assert found.low > 0, "twelve fakes more, and not one fewer, are no chance"
    assert found.high - found.low < (alone[1] - alone[0]) / 1.5


def test_a_class_that_lacks_has_no_difference() -> None:
    labels, scores = np.ones(10, np.int8), np.linspace(0, 1, 10, dtype=np.float32)
    found = paired_difference(labels, scores, 1 - scores)
    assert found["real_accuracy"] is None
    assert found["balanced_accuracy"] is None
    assert found["accuracy"] == found["fake_accuracy"] != None  # noqa: E711 - both are there and the same


def test_paired_intervals_cover_the_truth() -> None:
    truth, hits = 0.1, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = np.ones(150, np.int8)
        first = (rng.random(150) < 0.7).astype(np.float32)
        second = np.where(rng.random(150) < 0.1 / 0.3 * (first == 0), 1.0, first).astype(np.float32)
        found = paired_difference(labels, first, second)["accuracy"]
        assert found is not None
        hits += found.low <= truth <= found.high
    assert hits >= 175, hits
