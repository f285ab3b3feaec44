"""Half an hour of work with faults all the while: nothing is lost, and nothing grows."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import pytest
import redis

from tests.faults.deployment import FaultDeployment
from tests.faults.proxy import TcpProxy
from tests.faults.rows import Seen, row
from tests.servers import RedisServer
from tests.worker.harness import WorkerProcess, wait_until

_ROUND = 64
_SETTLING_SHARE = 1 / 6
_FAULT_SHARE = 0.01
_MB = 2**20


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    pid: int
    rss_mb: float
    descriptors: int
    threads: int
    redis_keys: int


def _sample(began: float, worker: psutil.Process, server: RedisServer) -> _Sample:
    with redis.Redis.from_url(server.url, socket_timeout=60) as client:
        keys = int(client.dbsize())  # type: ignore[arg-type]  # its stubs mean the asynchronous client too
    with worker.oneshot():
        memory_mb = worker.memory_info().rss / _MB
        return _Sample(time.monotonic() - began, worker.pid, memory_mb, worker.num_fds(), worker.num_threads(), keys)


def _slope_mb_per_minute(samples: list[_Sample]) -> float:
    """Of the least-squares line through the memory of the process."""
    count = len(samples)
    mean_t, mean_m = sum(s.at_s for s in samples) / count, sum(s.rss_mb for s in samples) / count
    spread = sum((s.at_s - mean_t) ** 2 for s in samples)
    return 60 * sum((s.at_s - mean_t) * (s.rss_mb - mean_m) for s in samples) / spread if spread else 0.0


def _with_faults(deployment: FaultDeployment, uris: list[str], rng: random.Random) -> Iterator[str]:
    """A round of images, one in a hundred of them missing, cut short or no image."""
    directory = deployment.log_path.parent / "files"
    for uri in uris:
        if rng.random() >= _FAULT_SHARE:
            yield uri
            continue
        bad = directory / "bad.jpg"
        kind = rng.randrange(3)
        if kind == 0:
            yield str(directory / "gone.jpg")
        elif kind == 1:
            bad.write_bytes(b"no image")
            yield str(bad)
        else:
            cut = directory / "cut.jpg"
            shutil.copy(uri, cut)
            cut.write_bytes(cut.read_bytes()[:700])
            yield str(cut)


def _network_fault(proxy: TcpProxy, server: RedisServer, rng: random.Random) -> str:
    kind = rng.choice(["reset", "black hole", "refused", "Redis killed"])
    if kind == "reset":
        proxy.reset()
    elif kind == "black hole":
        proxy.black_hole()
    elif kind == "refused":
        proxy.refuse()
        proxy.reset()
        time.sleep(rng.uniform(0.2, 2.0))
        proxy.refuse(False)
    else:
        server.kill()
        time.sleep(rng.uniform(0.2, 2.0))
        server.start()
    return kind


@pytest.mark.nightly
@row(
    "F33",
    injection="soak: 1 % bad images, a fault of network or broker in one round of 50",
    expected="memory grows ≤ 100 MB in all, ≤ 1 MB/min after the first sixth; descriptors, threads, keys flat",
)
def test_nothing_grows_in_a_soak_with_faults(
    deploy: Callable[..., FaultDeployment],
    migrated_postgres_url: str,
    redis_server: RedisServer,
    broker_proxy: TcpProxy,
    fault_rng: random.Random,
    seen: Seen,
    request: pytest.FixtureRequest,
) -> None:
    minutes: float = request.config.getoption("--soak-minutes")
    deployment = deploy(migrated_postgres_url, proxy=broker_proxy, CODE_WORKER_LOG_LEVEL="info")
    worker: WorkerProcess = deployment.worker()
    deployment.started()
    process = psutil.Process(worker.pid)
    uris = deployment.images(4 * _ROUND)
    began, rounds, faults, samples = time.monotonic(), 0, 0, list[_Sample]()
    while time.monotonic() - began < 60 * minutes:
        some = fault_rng.sample(uris, _ROUND)
        deployment.enqueue(_with_faults(deployment, some, fault_rng))
        if rounds % 50 == 25:
            _network_fault(broker_proxy, redis_server, fault_rng)
            faults += 1
        wait_until(lambda: not deployment.unfinished(), 120, "a round")
        samples.append(_sample(began, process, redis_server))
        rounds += 1
    assert worker.alive
    settled = [sample for sample in samples if sample.at_s > 60 * minutes * _SETTLING_SHARE]
    first, last = settled[: max(1, len(settled) // 10)], settled[-max(1, len(settled) // 10) :]
    growth_mb = max(s.rss_mb for s in samples) - samples[0].rss_mb
    slope = _slope_mb_per_minute(settled)
    figures = {
        "minutes": minutes,
        "jobs": rounds * _ROUND,
        "network_faults": faults,
        "growth_mb": growth_mb,
        "slope_mb_per_minute": slope,
        "descriptors": f"{max(s.descriptors for s in first)} → {max(s.descriptors for s in last)}",
        "threads": f"{max(s.threads for s in first)} → {max(s.threads for s in last)}",
        "redis_keys": f"{max(s.redis_keys for s in first)} → {max(s.redis_keys for s in last)}",
    }
    seen(**figures)
    assert growth_mb <= 100
    # A short soak ends before allocators have settled.
    assert slope <= (1 if minutes >= 30 else 5)
    for name in ("descriptors", "threads", "redis_keys"):
        assert max(getattr(s, name) for s in last) <= max(getattr(s, name) for s in first) + 3, name
