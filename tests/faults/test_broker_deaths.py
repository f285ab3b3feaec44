"""A broker that forgets, dies, freezes, falls silent or fills up: the ledger still has every job."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import redis

from code_worker.wire import BACKFILL, LIVE, NORMAL
from tests.faults.deployment import FaultDeployment
from tests.faults.proxy import TcpProxy
from tests.faults.rows import Bar, Seen, row
from tests.servers import RedisServer
from tests.worker.harness import wait_until

Deploy = Callable[..., FaultDeployment]


def _depth(server: RedisServer, queue: str = NORMAL) -> int:
    with redis.Redis.from_url(server.url, socket_timeout=60) as client:
        return int(client.llen(f"cw:{queue}"))  # type: ignore[arg-type]  # its stubs mean the asynchronous client too


def _flush(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


def _delete_queues(server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.delete(*(f"cw:{name}" for name in (LIVE, NORMAL, BACKFILL, "unacked", "unacked_index")))


def _ready_after(deployment: FaultDeployment, began: float, limit_s: float, ids: list[str]) -> float:
    """Seconds from `began` until the jobs have verdicts."""
    wait_until(lambda: deployment.decided(ids) == len(ids), limit_s, f"{len(ids)} verdicts: {deployment.counts()}")
    return time.monotonic() - began


@row("F2", injection="{how} with ≥ 500 jobs queued", expected="all judged ≤ 30 s after")
@pytest.mark.parametrize(
    ("database", "how"),
    [
        ("sqlite", "FLUSHALL"),
        ("postgresql", "queues and unacked deleted"),
        pytest.param("sqlite", "queues and unacked deleted", marks=pytest.mark.nightly),
        pytest.param("postgresql", "FLUSHALL", marks=pytest.mark.nightly),
    ],
)
def test_a_broker_that_loses_everything_loses_no_job(
    deploy: Deploy,
    request: pytest.FixtureRequest,
    redis_server: RedisServer,
    seen: Seen,
    bar: Bar,
    database: str,
    how: str,
) -> None:
    deployment = deploy(
        request.getfixturevalue("sqlite_url" if database == "sqlite" else "migrated_postgres_url"),
    )
    deployment.worker("--concurrency", "1")
    deployment.started()
    ids = deployment.enqueue(deployment.images(700))
    wait_until(lambda: deployment.counts().get("running"), 120, "a claimed batch")
    queued = 64 * _depth(redis_server)
    (_flush if how == "FLUSHALL" else _delete_queues)(redis_server)
    began = time.monotonic()
    done_s = _ready_after(deployment, began, bar(30), ids)
    assert queued >= 500
    seen(queued=queued, lost=0, all_done_s=done_s)


@contextmanager
def _down(server: RedisServer, rng: random.Random, shortest_s: float, longest_s: float) -> Iterator[float]:
    """Kills or stops the server for a while; yields for how long."""
    (server.kill if rng.random() < 0.5 else server.stop)()
    down_s = rng.uniform(shortest_s, longest_s)
    time.sleep(down_s)
    server.start()
    yield down_s


def _loaded(deployment: FaultDeployment, uri: str) -> list[str]:
    """Jobs that fill the one slot of one worker and one of four of another, until Redis is gone."""
    busy = deployment.enqueue([uri], priority=5, metadata={"seconds": 2.0})
    busy += deployment.enqueue([uri], priority=1, metadata={"seconds": 2.0})
    wait_until(lambda: deployment.counts().get("running", 0) >= 2, 120, "two busy workers")
    return busy


@pytest.mark.slow(reason="three workers wait for a broker that is away for seconds, more than once")
@row(
    "F3",
    injection="Redis killed or stopped {restarts} times for 0.2–6 s under three workers: idle, full, partly busy",
    expected="no worker exits or hangs; each judges ≤ 10 s after Redis is back",
)
@pytest.mark.parametrize("restarts", [2, pytest.param(7, marks=pytest.mark.nightly)])
def test_idle_full_and_partly_busy_workers_outlive_redis_restarts(
    restarts: int,
    deploy: Deploy,
    migrated_postgres_url: str,
    slow_jobs: dict[str, str],
    redis_server: RedisServer,
    fault_rng: random.Random,
    seen: Seen,
    bar: Bar,
) -> None:
    deployment = deploy(migrated_postgres_url, **slow_jobs)
    (uri,) = deployment.images(1)
    workers = [
        deployment.worker("--queues", "live", "--concurrency", "2"),
        deployment.worker("--queues", "normal", "--concurrency", "1"),
        deployment.worker("--queues", "backfill", "--concurrency", "4"),
    ]
    deployment.started(3)
    waited: dict[str, list[float]] = {"idle": [], "full": [], "partly_busy": []}
    for _ in range(restarts):
        busy = _loaded(deployment, uri)
        with _down(redis_server, fault_rng, 0.2, 6.0):
            began = time.monotonic()
            probes = {name: deployment.enqueue([uri], priority=n) for name, n in zip(waited, (8, 5, 1), strict=True)}
            pending = dict(probes)
            while pending:
                for name, ids in list(pending.items()):
                    if deployment.decided(ids):
                        waited[name].append(time.monotonic() - began)
                        del pending[name]
                assert time.monotonic() - began < bar(10), f"no verdict from {sorted(pending)}"
                time.sleep(0.05)
        assert all(worker.alive for worker in workers)
        _ready_after(deployment, time.monotonic(), 120, busy)
    assert len(deployment.events("worker_starting")) == 3
    seen(restarts=3 * restarts, exits=0, **{f"longest_{name}_s": max(times) for name, times in waited.items()})


def _freeze(deploy: Deploy, url: str, server: RedisServer, seen: Seen, bar: Bar, freeze_s: float) -> None:
    deployment = deploy(url)
    deployment.worker()
    deployment.started()
    (uri,) = deployment.images(1)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        with closing(deployment.client()) as client:
            job = client.enqueue(uri)
        deployment.accepted.append(job)
        accepted_s = time.monotonic() - began
        time.sleep(max(0.0, freeze_s - accepted_s))
        states = deployment.counts()
    finally:
        server.process.send_signal(signal.SIGCONT)
    thawed = time.monotonic()
    judged_s = _ready_after(deployment, thawed, bar(30), [job])
    assert accepted_s < bar(12)
    assert states == {"accepted": 1}
    seen(frozen_s=freeze_s, enqueue_returned_after_s=accepted_s, judged_after_thaw_s=judged_s, lost=0)


_FROZEN = "enqueue returns the id ≤ 12 s, the row stays accepted, the sweeper publishes it, 0 lost"


@pytest.mark.slow(reason="the broker stands still for 14 s, longer than producers wait for it")
@row("F4", injection="Redis stopped (SIGSTOP) for 14 s", expected=_FROZEN)
def test_a_frozen_broker_keeps_no_producer_and_loses_nothing(
    deploy: Deploy, migrated_postgres_url: str, redis_server: RedisServer, seen: Seen, bar: Bar
) -> None:
    _freeze(deploy, migrated_postgres_url, redis_server, seen, bar, 14)


@pytest.mark.nightly
@row("F4", injection="Redis stopped (SIGSTOP) for 45 s", expected=_FROZEN)
def test_a_broker_that_is_frozen_for_long_loses_nothing(
    deploy: Deploy, migrated_postgres_url: str, redis_server: RedisServer, seen: Seen, bar: Bar
) -> None:
    _freeze(deploy, migrated_postgres_url, redis_server, seen, bar, 45)


@pytest.mark.slow(reason="a connection is given up after ten seconds of silence")
@row(
    "F5",
    injection="a proxy swallows what the connections that are open carry; new ones are whole",
    expected="resumed ≤ 30 s; what was popped into the void is judged all the same",
)
def test_half_open_connections_are_given_up_and_their_jobs_found(
    deploy: Deploy,
    migrated_postgres_url: str,
    redis_server: RedisServer,
    broker_proxy: TcpProxy,
    seen: Seen,
    bar: Bar,
) -> None:
    deployment = deploy(migrated_postgres_url, proxy=broker_proxy)
    worker = deployment.worker()
    deployment.started()
    uris = deployment.images(40)
    _ready_after(deployment, time.monotonic(), 120, deployment.enqueue(uris[:1]))
    cut = broker_proxy.black_hole()
    began = time.monotonic()
    ids = [job for uri in uris for job in deployment.enqueue([uri])]
    popped = len(uris) - _depth(redis_server)
    wait_until(lambda: deployment.decided(ids), bar(30), "a first verdict")
    first_s = time.monotonic() - began
    all_s = _ready_after(deployment, began, bar(60), ids)
    assert worker.alive
    seen(connections_cut=cut, messages_popped_into_the_void=popped, first_verdict_s=first_s, all_done_s=all_s, lost=0)
