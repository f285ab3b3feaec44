"""A rollback is one command, and running workers follow it within seconds."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from code_worker.encoder.weights import read_weights
from code_worker.plugins import load_plugins
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.loading import load_release
from code_worker.releases.manifest import Source, read_manifest, release_id
from code_worker.settings import Settings
from code_worker.store import workers
from code_worker.types import Outcome
from tests.fork_server import forking_python
from tests.toy_release import write_toy_release
from tests.worker.harness import Deployment, decided, jpeg, promote_release, wait_until

FOLLOWED_WITHIN_S = 90
"""Ten seconds are promised; a shared machine may be far slower."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Releases whose heads, defaults and encoders all differ, so that a verdict that mixed them would show it."""
    directory, plugins = tmp_path_factory.mktemp("two"), load_plugins(Settings())
    made = []
    for seed, names in enumerate((["linear", "knn"], ["svm"])):
        source = write_toy_release(directory / f"whole-{seed}", seed=seed, depth=1, images=8)
        heads = load_release(source, plugins).heads
        target = directory / f"release-{seed}"
        facts = ReleaseFacts(source=Source(uri=f"test {seed}"), default_head=names[0], toy=True)
        build_from_parts(target, read_weights(source), {name: heads[name] for name in names}, plugins, facts)
        made.append(target)
    return made


def provenance_of(directory: Path) -> tuple[str, str, str, str]:
    """Release, manifest's hash, head and head's hash of every verdict of this release."""
    manifest, sha256 = read_manifest(directory)
    head = str(manifest.default_head)
    return release_id(sha256), sha256, head, manifest.heads[head].sha256


def roll_back(deployment: Deployment) -> str:
    command = [forking_python(), "-m", "code_worker", "releases", "rollback", "--reason", "too strict"]
    done = subprocess.run(
        command,
        check=True,
        env={**os.environ, **deployment.environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout


@pytest.mark.slow(reason="watches a worker through a promotion and a rollback")
def test_a_rollback_is_followed_within_ten_seconds_and_no_verdict_mixes_two_releases(
    deploy: Callable[..., Deployment], postgres_url: str, tmp_path: Path, two: list[Path]
) -> None:
    # The next beat is 20 minutes away: what the worker's row says of its release came with the release.
    deployment = deploy(postgres_url, promote=False, CODE_WORKER_WORKER__LEASE_S="3600")
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(7))
    first = promote_release(deployment, two[0])
    second = promote_release(deployment, two[1])
    worker = deployment.worker()
    in_use = "release_in_use"
    wait_until(lambda: deployment.events(in_use), 120, "a worker with the champion")
    client, store, ids = deployment.client(), deployment.store(), []

    def says(release: str) -> bool:
        alive = store.run(lambda session: workers.alive(session, within_s=3600), write=False)
        return [worker.release for worker in alive] == [release]

    wait_until(lambda: says(second), 120, "the worker's row to name the champion")

    def uses(release: str) -> bool:
        ids.extend(client.enqueue_many([str(tmp_path / "files" / "a.jpg")] * 4, priority=9))
        time.sleep(0.2)
        return deployment.events(in_use)[-1]["release"] == release

    assert not uses(first)

    assert f"{first} is the champion again (was {second})" in roll_back(deployment)
    wait_until(lambda: uses(first), FOLLOWED_WITHIN_S, "the worker to judge with the old champion again")
    wait_until(lambda: says(first), FOLLOWED_WITHIN_S, "the worker's row to name the old champion again")
    ids.append(client.enqueue(str(tmp_path / "files" / "a.jpg"), priority=9))
    found = decided(client, ids)
    assert (found[0].release, found[-1].release) == (second, first)
    assert {one.outcome for one in found} == {Outcome.JUDGED}
    made_by = {
        (one.provenance.release, one.provenance.manifest_sha256, one.head, one.provenance.head_sha256)
        for one in found
    }
    assert made_by == {provenance_of(directory) for directory in two}
    assert {one.provenance.head_plugin for one in found} == {f"code-worker {version('code-worker')}"}
    assert len({one.score for one in found}) == len(made_by), "each release has one answer to one image"
    assert worker.terminate() == 0
