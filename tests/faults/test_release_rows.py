"""Releases that are broken when a worker loads them, and releases that change all the time under load."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from code_worker.encoder.weights import read_weights
from code_worker.plugins import load_plugins
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.loading import load_release
from code_worker.releases.manifest import Source
from code_worker.releases.registry import Registry, open_registry
from code_worker.settings import Settings
from code_worker.store import jobs, releases, workers
from tests.faults.conftest import Deploy
from tests.faults.deployment import FaultDeployment
from tests.faults.rows import Bar, Seen, row
from tests.worker.harness import wait_until

QUICK = {"CODE_WORKER_WORKER__RELEASE_POLL_S": "0.5"}


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory, small_release_dir: Path) -> list[Path]:
    """Releases with the small one's encoder and one of its heads each, so that a mixture would show."""
    directory, plugins = tmp_path_factory.mktemp("variants"), load_plugins(Settings())
    weights, heads = read_weights(small_release_dir), load_release(small_release_dir, plugins).heads
    made = []
    for number, name in enumerate(("svm", "knn", "linear", "svm")):
        target = directory / f"{number}-{name}"
        facts = ReleaseFacts(source=Source(uri=f"variant {number}"), default_head=name, toy=True, notes=str(number))
        build_from_parts(target, weights, {name: heads[name]}, plugins, facts)
        made.append(target)
    return made


def registry_of(deployment: FaultDeployment) -> Registry:
    settings = deployment.settings
    return open_registry(settings, store=deployment.ledger, plugins=load_plugins(settings))


def point_to(deployment: FaultDeployment, release: str) -> None:
    """Moves the alias without a look at the files, as whoever damaged them afterwards would find it."""
    deployment.ledger.run(
        lambda session: releases.move_alias(session, "champion", release, by="test", reason="a fault")
    )


def gone(directory: Path) -> None:
    shutil.rmtree(directory)


def flipped(directory: Path) -> None:
    path = directory / "encoder" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def misshapen(directory: Path) -> None:
    """Another head's file in a head's place: whole, but of another form."""
    head = next(path for path in (directory / "heads").rglob("*") if path.is_file())
    head.write_bytes((directory / "encoder" / "model.safetensors").read_bytes()[:4096])


@row(
    "F29",
    injection="a champion whose files are missing, flipped by a bit, or of another shape when a worker loads it",
    expected="the worker says so and goes on with the release it has; it follows the next whole one within 10 s",
)
def test_a_release_that_is_broken_when_it_is_loaded_leaves_the_old_one_at_work(
    deploy: Deploy, sqlite_url: str, variants: list[Path], seen: Seen, bar: Bar
) -> None:
    deployment = deploy(sqlite_url, **QUICK)
    registry = registry_of(deployment)
    first = str(registry.champion())
    added = [registry.add(directory) for directory in variants]
    deployment.worker()
    deployment.started()
    paths = deployment.images(6)
    damages: list[Callable[[Path], None]] = [gone, flipped, misshapen]
    for damage, release in zip(damages, added, strict=False):
        damage(Path(deployment.settings.resolved_artifacts) / release)
        point_to(deployment, release)
        wait_until(lambda release=release: _refused(deployment, release), 120, f"{damage.__name__} is said")
        ids = deployment.enqueue(paths)
        wait_until(lambda ids=ids: deployment.decided(ids) == len(ids), 120, "judged all the same")
        assert _judged_by(deployment, ids) == {first}, damage.__name__
        point_to(deployment, first)
        time.sleep(1)
    began = time.monotonic()
    registry.promote(added[3], by="test")
    wait_until(lambda: _in_use(deployment) == added[3], bar(10), "the worker follows the whole one")
    ids = deployment.enqueue(paths)
    wait_until(lambda: deployment.decided(ids) == len(ids), 120, "judged")
    assert _judged_by(deployment, ids) == {added[3]}
    seen(broken=len(damages), judged_by_another=0, followed_s=time.monotonic() - began)


def _refused(deployment: FaultDeployment, release: str) -> bool:
    return any(one.get("release") == release and one["level"] == "error" for one in deployment.log())


def _in_use(deployment: FaultDeployment) -> str | None:
    events = deployment.events("release_in_use")
    return str(events[-1]["release"]) if events else None


def _judged_by(deployment: FaultDeployment, ids: list[str]) -> set[str]:
    client = deployment.client()
    return {str(verdict.release) for job in ids if (verdict := client.verdict(job)) is not None}


@row(
    "F30",
    injection="the champion flips every 2 s for {seconds} s under load, 2 workers, {database}",
    expected="no job fails, every verdict's release and head belong together, all workers follow within 30 s",
)
@pytest.mark.parametrize(
    ("database", "seconds"),
    [
        ("sqlite", 10),
        pytest.param("sqlite", 60, marks=pytest.mark.nightly),
        pytest.param("postgresql", 60, marks=pytest.mark.nightly),
    ],
)
def test_a_champion_that_flips_all_the_time_mixes_nothing(
    deploy: Deploy,
    request: pytest.FixtureRequest,
    variants: list[Path],
    database: str,
    seconds: int,
    seen: Seen,
    bar: Bar,
) -> None:
    fixture = "sqlite_url" if database == "sqlite" else "migrated_postgres_url"
    deployment = deploy(request.getfixturevalue(fixture), **QUICK)
    registry = registry_of(deployment)
    pair = [str(registry.champion()), registry.add(variants[0])]
    for _ in range(2):
        deployment.worker()
    deployment.started(2)
    paths = deployment.images(8)
    calm = _latencies_ms(deployment, deployment.enqueue(paths * 4, priority=9))
    ids: list[str] = []
    deadline, flips = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        registry.promote(pair[(flips + 1) % 2], by="test")
        flips += 1
        for _ in range(4):
            ids += deployment.enqueue(paths[:4], priority=9)
            time.sleep(0.5)
    shaken = _latencies_ms(deployment, ids)
    champion = registry.champion()
    began = time.monotonic()
    wait_until(lambda: _followed(deployment, 2, str(champion)), bar(30), "both workers follow")
    client = deployment.client()
    found = [client.verdict(job) for job in ids]
    assert all(verdict is not None and verdict.label is not None for verdict in found)
    heads = {str(verdict.release): verdict.head for verdict in found if verdict is not None}
    pairs = {(verdict.release, verdict.head) for verdict in found if verdict is not None}
    assert len(pairs) == len(heads), "one head for each release"
    seen(
        flips=flips,
        jobs=len(ids),
        failed=0,
        followed_s=time.monotonic() - began,
        p99_calm_ms=float(np.percentile(calm, 99)),
        p99_ms=float(np.percentile(shaken, 99)),
    )


def _followed(deployment: FaultDeployment, count: int, champion: str) -> bool:
    """Whether every worker process says that it judges with the champion; some saw no change and change back."""
    alive = deployment.ledger.run(lambda session: workers.alive(session, within_s=3600), write=False)
    return [worker.release for worker in alive] == [champion] * count


def _latencies_ms(deployment: FaultDeployment, ids: list[str]) -> list[float]:
    """From acceptance to verdict, once all are there."""
    wait_until(lambda: deployment.decided(ids) == len(ids), 120, "all of them")
    found = deployment.ledger.run(lambda session: [jobs.get(session, job) for job in ids], write=False)
    return [1000 * (job.finished_at - job.created_at).total_seconds() for job in found if job and job.finished_at]
