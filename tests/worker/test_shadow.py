"""A challenger in a real worker: it scores what the champion judged, and changes nothing of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from code_worker.encoder.weights import random_weights
from code_worker.plugins import load_plugins
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source
from code_worker.releases.registry import Registry, open_registry
from code_worker.types import Outcome, Verdict
from code_worker_heads.linear import LinearHead
from tests.rounding import promised_score
from tests.toy_release import write_toy_release
from tests.worker.harness import Deployment, decided, jpeg, promote_release, wait_until

IMAGES = 24
MOODY = """
import numpy as np
from code_worker import Head, HeadSpec, hookimpl

class Moody(Head):
    '''Scores the probes of building (80, 256) and loading (4, 80), and nothing else.'''
    def fit(self, embeddings, labels):
        return self
    def score(self, embeddings):
        if len(embeddings) not in {4, 80, 256}:
            raise ZeroDivisionError("not today")
        return np.full(len(embeddings), 0.5, np.float32)
    def save(self, directory):
        (directory / "nothing.txt").write_text("-")
    @classmethod
    def load(cls, directory, options=None):
        return cls(options)

@hookimpl
def code_worker_register_heads():
    return [HeadSpec("moody", Moody, "a test")]
"""


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small release, one with its encoder and heads but another default, and one with another encoder."""
    directory = tmp_path_factory.mktemp("releases")
    champion = write_toy_release(directory / "champion", depth=1, images=8)
    refitted = directory / "refitted"
    shutil.copytree(champion, refitted)
    manifest = json.loads((refitted / "manifest.json").read_text())
    (refitted / "manifest.json").write_text(json.dumps({**manifest, "notes": "refitted", "default_head": "svm"}))
    retrained = write_toy_release(directory / "retrained", seed=1, depth=1, images=8)
    return [champion, refitted, retrained]


def registry_of(deployment: Deployment) -> Registry:
    settings = deployment.settings
    return open_registry(settings, store=deployment.store(), plugins=load_plugins(settings))


def judge_all(deployment: Deployment, ids: list[str]) -> list[Verdict]:
    return decided(deployment.client(), ids)


def shadow_rows(deployment: Deployment, release: str) -> dict[str, tuple[float, str, float]]:
    """By job: the challenger's score and head, the champion's score."""
    statement = "select job_id, score, head, champion_score from shadow_scores where release = :release"
    with deployment.store().engine.connect() as connection:
        rows = connection.execute(text(statement), {"release": release}).all()
    return {str(job).replace("-", ""): (score, head, was) for job, score, head, was in rows}


def enqueue(deployment: Deployment, files: Path, first: int = 0) -> list[str]:
    for number in range(first, first + IMAGES):
        (files / f"{number}.jpg").write_bytes(jpeg(number))
    (files / "bad.jpg").write_text("no image")
    uris = [str(files / f"{number}.jpg") for number in range(first, first + IMAGES)]
    return deployment.client().enqueue_many([*uris, str(files / "bad.jpg")])


def test_challengers_score_live_traffic_and_change_no_verdict(
    deploy: Callable[..., Deployment], postgres_url: str, tmp_path: Path, releases: list[Path]
) -> None:
    deployment = deploy(postgres_url, promote=False, CODE_WORKER_WORKER__RELEASE_POLL_S="0.5")
    champion, registry = promote_release(deployment, releases[0]), registry_of(deployment)
    worker = deployment.worker()
    files = tmp_path / "files"
    alone = judge_all(deployment, enqueue(deployment, files))

    def beside(directory: Path) -> tuple[str, list[Verdict], dict[str, tuple[float, str, float]]]:
        release = registry.add(directory)
        registry.challenge(release, by="test")
        wait_until(
            lambda: any(event["release"] == release for event in deployment.events("release_in_use")),
            120,
            "the challenger in the worker",
        )
        # The same files again: their embeddings are known, so nothing is decoded on the champion's way.
        found = judge_all(deployment, enqueue(deployment, files))
        rows = wait_until(
            lambda: len(seen := shadow_rows(deployment, release)) >= IMAGES and seen, 120, "the shadow scores"
        )
        return release, found, rows

    for directory in releases[1:]:
        release, found, rows = beside(directory)
        assert [(one.label, one.score, one.provenance) for one in found] == [
            (one.label, one.score, one.provenance) for one in alone
        ]
        judged = {one.job_id.replace("-", ""): one for one in found if one.outcome is Outcome.JUDGED}
        assert set(rows) == set(judged), "no row for what was rejected"
        assert {job: was for job, (_, _, was) in rows.items()} == {job: one.score for job, one in judged.items()}
        assert {head for _, head, _ in rows.values()} == {"linear"}
        apart = [abs(score - was) for score, _, was in rows.values()]
        near = promised_score(LinearHead.load(releases[0] / "heads" / "linear"))
        assert (max(apart) <= near) == (directory == releases[1]), "the same encoder and head give the same score"
    fresh = judge_all(deployment, enqueue(deployment, files, first=100))
    wait_until(lambda: len(shadow_rows(deployment, release)) == 2 * IMAGES, 120, "scores of images seen first now")
    assert {one.release for one in fresh} == {champion}
    registry.withdraw(by="test")
    wait_until(lambda: deployment.events("release_out_of_use"), 120, "the challenger to be let go")
    assert worker.terminate() == 0


def test_a_challenger_whose_head_raises_harms_nothing(
    deploy: Callable[..., Deployment], tmp_path: Path, releases: list[Path]
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "moody.py").write_text(MOODY)
    deployment = deploy(
        f"sqlite:///{tmp_path / 'worker.db'}",
        promote=False,
        CODE_WORKER_PLUGINS_DIR=str(tmp_path / "plugins"),
        CODE_WORKER_WORKER__RELEASE_POLL_S="0.5",
    )
    champion = promote_release(deployment, releases[0])
    registry, plugins = registry_of(deployment), load_plugins(deployment.settings)
    facts = ReleaseFacts(source=Source(uri="test"))
    heads = {"moody": plugins.head_class("moody")()}
    build_from_parts(tmp_path / "moody", random_weights(0, depth=1), heads, plugins, facts)
    registry.challenge(registry.add(tmp_path / "moody"), by="test")
    worker = deployment.worker()
    wait_until(lambda: len(deployment.events("release_in_use")) == 2, 120, "both releases in the worker")
    found = judge_all(deployment, enqueue(deployment, tmp_path / "files"))
    wait_until(lambda: deployment.events("shadow_head_failed"), 120, "the head to be named")
    again = judge_all(deployment, enqueue(deployment, tmp_path / "files", first=100))
    assert {one.release for one in [*found, *again]} == {champion}
    assert [one.outcome for one in found] == [Outcome.JUDGED] * IMAGES + [Outcome.REJECTED]
    assert [one.outcome for one in again] == [Outcome.JUDGED] * IMAGES + [Outcome.REJECTED]
    assert len(deployment.events("shadow_head_failed")) == 1, "it is said once a minute"
    assert "not today" in deployment.events("shadow_head_failed")[0]["exception"]
    assert worker.terminate() == 0
