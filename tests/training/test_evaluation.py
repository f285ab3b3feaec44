from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from code_worker._version import __version__
from code_worker.data.datasets.examples import Example, Skipped
from code_worker.errors import ArtifactError, DatasetError, UnknownHeadError
from code_worker.moderation.policy import Policy
from code_worker.moderation.runtime import Runtime
from code_worker.settings import LimitSettings
from code_worker.training.evaluation.compare import Bounds, compare, compare_scores, missed_bounds, regressions
from code_worker.training.evaluation.evaluate import Evaluation, EvaluationPlan, evaluate, measure, published_table
from code_worker.training.evaluation.metrics import DECISIONS, RANKINGS, figures
from code_worker.training.evaluation.robustness import UNNAMED, group_images
from tests.moderation.doubles import FirstValueHead
from tests.training.labelled_noise import mislabelled, noise_examples

LIMITS = LimitSettings()
QUICK = EvaluationPlan(resamples=20)


def measured(runtime: Runtime, examples: Sequence[Example], plan: EvaluationPlan = QUICK, **more: Any) -> Evaluation:
    return evaluate(examples, runtime, LIMITS, plan, source="noise", **more)


def row(evaluation: Evaluation, name: str, *, condition: str = "clean", head: str = "linear") -> Mapping[str, Any]:
    (found,) = (
        one
        for one in evaluation.report["results"]
        if (one["name"], one["condition"], one["head"]) == (name, condition, head)
    )
    return found  # type: ignore[no-any-return]


def test_every_head_is_measured_for_every_group_and_the_judging_one_comes_first(shallow_runtime: Runtime) -> None:
    evaluation = measured(shallow_runtime, noise_examples(16))
    groups = [("overall", "all"), ("generator", "doubler"), ("generator", "enlarger")]
    groups += [("collection", "camera"), ("collection", "scans")]
    assert [(one["head"], one["kind"], one["name"]) for one in evaluation.report["results"]] == [
        (head, *group) for head in ("linear", "knn", "svm") for group in groups
    ]
    assert row(evaluation, "all")["published"]["balanced_accuracy"]["value"] == 1
    assert (row(evaluation, "enlarger")["n_real"], row(evaluation, "enlarger")["n_fake"]) == (8, 4)
    camera = row(evaluation, "camera")
    assert (camera["n_real"], camera["n_fake"]) == (4, 0)
    assert camera["ranking"]["auroc"] is None
    assert camera["published"]["real_accuracy"]["value"] == 1


def test_figures_are_those_of_the_scores_with_an_interval_around(shallow_runtime: Runtime) -> None:
    evaluation = measured(shallow_runtime, mislabelled(noise_examples(20), [0, 3, 5]))
    scored = evaluation.of("clean", "linear")
    expected = figures(scored.labels, scored.scores)
    found = row(evaluation, "all")
    for name in (*DECISIONS, *RANKINGS):
        figure = (found["published"] | found["ranking"])[name]
        assert figure["value"] == expected[name]
        assert figure["low"] <= figure["high"]
    assert 0 < found["published"]["accuracy"]["low"] < found["published"]["accuracy"]["high"] <= 1


def test_the_report_says_what_was_measured_on_what_and_how(shallow_runtime: Runtime) -> None:
    examples = noise_examples(8)
    skipped = [Skipped("a.txt", "no label"), Skipped("set", "hidden", 2, (".DS_Store",))]
    evaluation = measured(shallow_runtime, examples, toy=True, skipped=skipped)
    report = json.loads(json.dumps(evaluation.report, allow_nan=False))
    assert report["code_version"] == __version__
    assert report["release"]["id"] == shallow_runtime.release
    assert report["release"]["manifest_sha256"] == shallow_runtime.manifest_sha256
    assert report["release"]["toy"] is True
    assert report["data"]["source"] == "noise"
    assert (report["data"]["real"], report["data"]["fake"], report["data"]["distinct"]) == (4, 4, 8)
    assert report["data"]["generators"] == {"doubler": 2, "enlarger": 2}
    assert report["plan"]["conditions"] == ["clean"]
    assert report["plan"]["seed"] == 0
    assert report["skipped"] == [{"key": "a.txt", "reason": "no label"}]
    assert report["passed_over"] == [{"key": "set", "reason": "hidden", "files": 2, "some": [".DS_Store"]}]
    again = measured(shallow_runtime, list(reversed(examples))).report["data"]
    assert again["digest"] == report["data"]["digest"], "the order of the images is no difference"
    other = measured(shallow_runtime, mislabelled(examples, [2])).report["data"]
    assert other["digest"] != report["data"]["digest"]


def test_the_same_seed_gives_the_same_figures_of_the_same_scores(shallow_runtime: Runtime) -> None:
    scored = measured(shallow_runtime, mislabelled(noise_examples(12), [1, 4])).scored[0]
    once = measure(scored, QUICK, (0.4, 0.6))
    assert measure(scored, QUICK, (0.4, 0.6)) == once
    assert measure(scored, replace(QUICK, seed=1), (0.4, 0.6)) != once


def test_deployed_thresholds_are_those_of_the_release_unless_a_policy_is_given(shallow_runtime: Runtime) -> None:
    own = measured(shallow_runtime, noise_examples(8))
    assert own.report["plan"]["thresholds"]["deployed"] == {"policy": "published", "low": 0.5, "high": 0.5}
    assert row(own, "all")["deployed"] == row(own, "all")["published"]
    strict = Policy(id="p-1", low=0.0, high=1.0)
    evaluation = measured(shallow_runtime, noise_examples(8), replace(QUICK, deployed=strict))
    assert evaluation.report["plan"]["thresholds"]["deployed"] == {"policy": "p-1", "low": 0.0, "high": 1.0}
    assert row(evaluation, "all")["published"]["accuracy"]["value"] == 1
    assert row(evaluation, "all")["deployed"]["uncertain"]["value"] == 1


def test_without_a_bootstrap_figures_have_no_interval(shallow_runtime: Runtime) -> None:
    figure = row(measured(shallow_runtime, noise_examples(8), EvaluationPlan(resamples=0)), "all")["published"][
        "accuracy"
    ]
    assert figure == {"value": 1.0, "low": None, "high": None}


def test_one_class_alone_is_measured_as_far_as_it_goes(shallow_runtime: Runtime) -> None:
    reals = [one for one in noise_examples(8) if one.label == 0]
    evaluation = measured(shallow_runtime, reals)
    everything = row(evaluation, "all")
    assert everything["published"]["fpr"]["value"] == 0
    assert everything["published"]["balanced_accuracy"] is None
    assert published_table(evaluation.report, "linear") == []


def test_every_image_is_embedded_once_per_transform_and_clean_ones_come_from_the_cache(
    shallow_runtime: Runtime,
) -> None:
    store: dict[str, bytes] = {}
    counted: list[int] = []

    def known(hashes: Sequence[str]) -> Mapping[str, bytes]:
        return {one: store[one] for one in hashes if one in store}

    plan = replace(QUICK, presets=("clean", "delivery"))
    first = measured(
        shallow_runtime, noise_examples(6), plan, known=known, keep=store.update, progress=counted.append
    )
    assert len(store) == 6, "what a transform changed is not kept"
    assert sum(counted) == 18, "clean once, though two presets have it"
    before = shallow_runtime.embedder.stats().crops  # type: ignore[attr-defined]
    again = measured(shallow_runtime, noise_examples(6), plan, known=known, keep=store.update)
    assert shallow_runtime.embedder.stats().crops - before == 12  # type: ignore[attr-defined]
    clean = len(again.report["results"]) // 3
    assert again.report["results"][:clean] == first.report["results"][:clean]


def test_conditions_are_measured_apart(shallow_runtime: Runtime) -> None:
    evaluation = measured(
        shallow_runtime, noise_examples(8), replace(QUICK, presets=("sidbench",), heads=("linear",))
    )
    lines = published_table(evaluation.report, "linear")
    assert [key for key, *_ in lines][:3] == ["clean_doubler", "clean_enlarger", "jpeg_95_doubler"]
    assert len(lines) == 16
    assert lines[0] == ("clean_doubler", 100.0, 100.0, 100.0)
    blurred = row(evaluation, "all", condition="blur_4")["published"]
    assert blurred["balanced_accuracy"]["value"] < 1, "blurred noise is no longer what the head knows"


def test_variants_of_the_data_set_are_the_conditions_of_its_preset(shallow_runtime: Runtime) -> None:
    examples = noise_examples(6, 1, variant="augm") + noise_examples(8, 2, variant="no_augm")
    evaluation = measured(shallow_runtime, examples, replace(QUICK, presets=("d3",), heads=("knn",)))
    assert evaluation.report["plan"]["conditions"] == ["no_augm", "augm"]
    assert row(evaluation, "all", condition="augm", head="knn")["n"] == 6
    assert row(evaluation, "all", condition="no_augm", head="knn")["n"] == 8
    assert evaluation.report["data"]["images"] == 14
    assert [key for key, *_ in published_table(evaluation.report, "knn")] == [
        "no_augm_doubler",
        "no_augm_enlarger",
        "augm_doubler",
        "augm_enlarger",
    ]
    clean = measured(shallow_runtime, examples, replace(QUICK, heads=("knn",)))
    assert row(clean, "augm", head="knn")["kind"] == "variant"


def test_what_cannot_be_used_is_listed_once(shallow_runtime: Runtime) -> None:
    broken = Example("broken.png", 1, lambda: b"no image at all, and long enough", generator="enlarger")
    evaluation = measured(
        shallow_runtime, [*noise_examples(4), broken], replace(QUICK, presets=("delivery",), heads=("linear",))
    )
    assert [one["key"] for one in evaluation.report["skipped"]] == ["broken.png"]
    assert evaluation.report["data"]["images"] == 4


def test_nothing_usable_says_why(shallow_runtime: Runtime) -> None:
    broken = [Example(f"{n}.png", 1, lambda: b"no image at all, and long enough") for n in range(3)]
    with pytest.raises(DatasetError, match="noise: none of 3 images can be used: 3 × unsupported_format"):
        measured(shallow_runtime, broken)
    with pytest.raises(DatasetError, match="noise holds no labelled image"):
        measured(shallow_runtime, [])


def test_an_unknown_head_is_refused_before_an_image_is_read(shallow_runtime: Runtime) -> None:
    def read() -> bytes:
        raise AssertionError("read too early")

    with pytest.raises(UnknownHeadError, match="known: knn, linear, svm"):
        measured(shallow_runtime, [Example("a", 0, read)], EvaluationPlan(heads=("crystal-ball",)))


def test_a_head_that_breaks_its_contract_is_named(shallow_runtime: Runtime) -> None:
    class Wild(FirstValueHead):
        def score(self, embeddings: np.ndarray) -> np.ndarray:
            return np.full(len(embeddings), 7.0, np.float32)

    wild = replace(shallow_runtime, heads={**shallow_runtime.heads, "wild": Wild()})
    with pytest.raises(ArtifactError, match="wild"):
        measured(wild, noise_examples(4), EvaluationPlan(heads=("wild",)))


def test_images_that_nobody_names_a_source_for_are_a_group_too() -> None:
    examples = [Example("a", 0, bytes), Example("b", 1, bytes), Example("c", 1, bytes, generator="sdxl")]
    groups = {(one.kind, one.name): one.members.tolist() for one in group_images(examples)}
    assert groups["generator", UNNAMED] == [True, True, False]
    assert groups["generator", "sdxl"] == [True, False, True]
    assert groups["collection", UNNAMED] == [True, True, True]


def test_bounds_are_checked_under_every_condition_for_the_heads_that_are_asked(shallow_runtime: Runtime) -> None:
    plan = replace(QUICK, presets=("sidbench",), heads=("linear", "knn"))
    report = measured(shallow_runtime, noise_examples(8), plan).report
    assert missed_bounds(report, Bounds(), ["linear"]) == []
    assert missed_bounds(report, Bounds(max_fpr=1, min_balanced_accuracy=0), ["linear", "knn"]) == []
    lines = missed_bounds(report, Bounds(min_balanced_accuracy=0.95), ["linear"])
    assert lines
    assert all("head linear" in line and "below 0.95" in line for line in lines)
    assert not any("under clean" in line for line in lines)


def test_a_bound_that_the_data_cannot_check_is_missed(shallow_runtime: Runtime) -> None:
    fakes = [one for one in noise_examples(8) if one.label]
    report = measured(shallow_runtime, fakes).report
    lines = missed_bounds(report, Bounds(min_balanced_accuracy=0.5, max_fpr=0.1), ["linear"])
    assert [line.partition(" under")[0] for line in lines] == ["balanced accuracy", "false alarms"]
    assert all("cannot be told" in line for line in lines)


def test_a_release_compared_with_itself_differs_by_nothing(shallow_runtime: Runtime) -> None:
    evaluation = measured(shallow_runtime, mislabelled(noise_examples(12), [2, 5]))
    compared = compare(evaluation, evaluation)
    assert [(one.head, one.name) for one in compared][:2] == [("linear", "all"), ("linear", "doubler")]
    for one in compared:
        assert one.first == one.second
        differences = [difference for difference in one.difference.values() if difference is not None]
        assert differences
        assert all(one.value == 0 and one.low == -one.high < 0 for one in differences), "few images prove little"
    assert regressions(compared, 0.0) == []
    json.dumps([one.to_dict() for one in compared], allow_nan=False)


def test_what_a_generator_or_the_reals_lose_is_found_by_name() -> None:
    examples = noise_examples(40)
    labels = np.array([one.label for one in examples])
    good = np.where(labels == 1, 0.9, 0.1).astype(np.float32)
    worse = good.copy()
    of_enlarger = [place for place, one in enumerate(examples) if one.generator == "enlarger"]
    worse[of_enlarger[:3]] = 0.2
    compared = compare_scores(examples, good, worse, head="linear")
    (lost,) = regressions(compared, 0.02)
    assert lost.name == "generator enlarger"
    assert lost.lost.value == pytest.approx(-0.3)
    assert lost.lost.low < -0.3 < 0 < lost.lost.high, "three of ten may be chance"
    assert "generator enlarger loses 30.0 points" in str(lost)
    assert regressions(compared, 0.3) == [], "as much as is allowed"
    assert regressions(compare_scores(examples, worse, good), 0.0) == [], "a gain is no loss"
    alarms = good.copy()
    alarms[labels == 0] = 0.7
    names = {one.name for one in regressions(compare_scores(examples, good, alarms), 0.02)}
    assert names == {"real images"}


def test_each_release_is_read_at_its_own_thresholds() -> None:
    examples = noise_examples(20)
    labels = np.array([one.label for one in examples])
    scores = np.where(labels == 1, 0.4, 0.1).astype(np.float32)
    (everything, *_) = compare_scores(examples, scores, scores, threshold_second=0.3)
    difference = everything.difference["fake_accuracy"]
    assert difference is not None
    assert difference.value == 1


def test_only_images_that_both_have_scored_are_compared(shallow_runtime: Runtime) -> None:
    examples = noise_examples(12)
    first, second = measured(shallow_runtime, examples[:8]), measured(shallow_runtime, examples[4:])
    (everything, *_) = compare(first, second)
    assert everything.n == 4
    with pytest.raises(DatasetError, match="in common"):
        compare(measured(shallow_runtime, examples[:4]), measured(shallow_runtime, examples[4:]))
