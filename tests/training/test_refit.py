"""Heads fitted anew, a stranger's too, and the release that is built of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from code_worker.errors import TrainingError, UnknownHeadError
from code_worker.plugins import InstalledPlugin, Plugins, load_plugins
from code_worker.releases.loading import load_release
from code_worker.releases.manifest import Thresholds
from code_worker.settings import Settings
from code_worker.training.refit import HeadPlan, Origin, build_candidate, fit_heads, plan_heads
from code_worker.training.snapshot import Member
from tests.training.learning import build_champion, tiny_weights

ORIGIN = Origin("refit", "run-1", "r-base", "snapshot-1")
BROKEN = """
from code_worker import Head, HeadSpec, hookimpl

class Broken(Head):
    def fit(self, embeddings, labels):
        raise RuntimeError("no luck today")
    def score(self, embeddings):
        raise NotImplementedError
    def save(self, directory):
        raise NotImplementedError
    @classmethod
    def load(cls, directory, options=None):
        raise NotImplementedError

@hookimpl
def code_worker_register_heads():
    return [HeadSpec("broken", Broken)]
"""


@pytest.fixture
def plugins() -> Plugins:
    import code_worker_example_head  # a stranger's plugin

    found = load_plugins(Settings())
    found.add(InstalledPlugin("example", "1", "example-head"), code_worker_example_head)
    return found


def images(count: int = 80) -> tuple[list[Member], np.ndarray]:
    """Members that may be learned from, and embeddings in which the fakes lie apart."""
    hashes = [f"{number:064x}" for number in range(count)]
    members = [Member(sha256, number % 2, None, None, new=True) for number, sha256 in enumerate(hashes)]
    labels = np.array([member.label for member in members])
    embeddings = np.random.default_rng(0).normal(size=(count, 192)) + 2 * labels[:, None]
    return members, embeddings.astype(np.float32)


def test_every_head_on_offer_is_fitted_a_strangers_too(plugins: Plugins, tmp_path: Path) -> None:
    plans = plan_heads(plugins, None)
    assert set(plans) == {"knn", "linear", "mahalanobis", "svm"}
    members, embeddings = images()
    heads = fit_heads(plans, plugins, members, embeddings)
    build_candidate(
        tmp_path / "release",
        tiny_weights(),
        heads,
        plans=plans,
        plugins=plugins,
        champion=None,
        origin=ORIGIN,
        evaluation={"holdout": {}},
    )
    loaded = load_release(tmp_path / "release", plugins)
    labels = np.array([member.label for member in members])
    for name in ("knn", "linear"):
        assert ((loaded.heads[name].score(embeddings) >= 0.5) == (labels == 1)).all()
    assert (loaded.heads["mahalanobis"].score(embeddings[labels == 1]) >= 0.5).all()
    assert loaded.manifest.source.uri == "refit of r-base on snapshot snapshot-1"
    assert loaded.manifest.notes == "refit by run run-1"
    assert loaded.manifest.evaluation == {"holdout": {}}


def test_the_champions_options_default_head_thresholds_and_mark_are_inherited(
    plugins: Plugins, tmp_path: Path
) -> None:
    own = load_release(build_champion(tmp_path / "champion", heads=("linear", "svm")), plugins).manifest
    twice = own.heads["linear"].model_copy(update={"options": {"C": 2.5}})
    champion = own.model_copy(
        update={
            "heads": {**own.heads, "strict": twice},
            "default_head": "strict",
            "thresholds": Thresholds(low=0.4, high=0.7),
        }
    )
    plans = plan_heads(plugins, champion)
    assert plans["strict"] == HeadPlan("linear", {"C": 2.5})
    assert set(plans) == {"knn", "linear", "mahalanobis", "strict", "svm"}
    members, embeddings = images()
    heads = fit_heads(plans, plugins, members, embeddings)
    build_candidate(
        tmp_path / "release",
        tiny_weights(),
        heads,
        plans=plans,
        plugins=plugins,
        champion=champion,
        origin=ORIGIN,
        evaluation={},
    )
    manifest = load_release(tmp_path / "release", plugins).manifest
    assert (manifest.default_head, manifest.thresholds, manifest.toy) == ("strict", champion.thresholds, True)
    assert manifest.heads["strict"].options["C"] == 2.5
    assert manifest.heads["strict"].plugin_head == "linear"


def test_a_head_that_cannot_be_fitted_fails_the_candidate_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    plugins = load_plugins(Settings(plugins_dir=tmp_path))
    members, embeddings = images()
    with pytest.raises(TrainingError, match="head 'broken' cannot be fitted on 80 images: RuntimeError: no luck"):
        fit_heads(plan_heads(plugins, None), plugins, members, embeddings)


def test_a_head_that_calls_exit_fails_the_candidate_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN.replace("RuntimeError", "SystemExit"))
    plugins = load_plugins(Settings(plugins_dir=tmp_path))
    with pytest.raises(TrainingError, match="head 'broken' cannot be fitted on 80 images: SystemExit: no luck"):
        fit_heads(plan_heads(plugins, None), plugins, *images())


@pytest.mark.parametrize("array", ["embeddings", "labels"])
@pytest.mark.parametrize("one_class", [True, False])
def test_a_head_cannot_write_to_what_others_learn_from(tmp_path: Path, array: str, one_class: bool) -> None:
    writing = BROKEN.replace('raise RuntimeError("no luck today")', f"{array} += 1")
    (tmp_path / "broken.py").write_text(writing.replace("(Head):", f"(Head):\n    one_class = {one_class}"))
    plugins = load_plugins(Settings(plugins_dir=tmp_path))
    with pytest.raises(TrainingError, match=r"head 'broken' cannot be fitted on \d+ images: ValueError: .*read-only"):
        fit_heads({"broken": HeadPlan("broken", {})}, plugins, *images())


def test_options_that_a_head_does_not_know_fail_the_candidate_by_its_name(plugins: Plugins) -> None:
    members, embeddings = images()
    with pytest.raises(TrainingError, match="head 'knn' cannot be fitted"):
        fit_heads({"knn": HeadPlan("knn", {"colour": "red"})}, plugins, members, embeddings)
    with pytest.raises(UnknownHeadError, match="unknown head 'gone'"):
        fit_heads({"gone": HeadPlan("gone", {})}, plugins, members, embeddings)


def test_a_candidate_that_was_built_before_a_crash_is_kept_and_half_of_one_is_not(
    plugins: Plugins, tmp_path: Path
) -> None:
    plans = {"linear": HeadPlan("linear", {})}
    members, embeddings = images()
    heads = fit_heads(plans, plugins, members, embeddings)
    directory = tmp_path / "release"

    def build() -> bytes:
        build_candidate(
            directory,
            tiny_weights(),
            heads,
            plans=plans,
            plugins=plugins,
            champion=None,
            origin=ORIGIN,
            evaluation={},
        )
        return (directory / "manifest.json").read_bytes()

    (tmp_path / "release.partial").mkdir()
    (tmp_path / "release.partial" / "left").touch()
    first = build()
    assert build() == first
    (directory / "encoder" / "model.safetensors").write_bytes(b"rotten")
    second = json.loads(build())
    assert second["files"] == json.loads(first)["files"]
    load_release(directory, plugins)
