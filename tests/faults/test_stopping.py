"""Workers that are told to stop, politely or not: nothing that they hold or have waiting is lost."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from code_worker.wire import LIVE, QUEUES
from tests.faults.deployment import FaultDeployment
from tests.faults.proxy import TcpProxy
from tests.faults.rows import Bar, Seen, row
from tests.servers import RedisServer, S3Server
from tests.worker.harness import WorkerProcess, promote_release, wait_until

Deploy = Callable[..., FaultDeployment]
_BATCH_S = 64 * 0.02


def _in_the_broker(server: RedisServer) -> tuple[int, int]:
    """Messages in the queues, and messages that a worker holds."""
    with redis.Redis.from_url(server.url, socket_timeout=60) as client:
        waiting = sum(int(client.llen(f"cw:{queue}")) for queue in QUEUES)  # type: ignore[arg-type]  # async stubs
        return waiting, int(client.hlen("cw:unacked"))  # type: ignore[arg-type]  # async stubs


def _ready(deployment: FaultDeployment, lives: int) -> WorkerProcess:
    """A worker that holds a batch and has others waiting."""
    worker = deployment.worker("--concurrency", "2")
    deployment.started(lives)
    wait_until(lambda: deployment.counts().get("running"), 120, "a claimed batch")
    return worker


def _stopped(worker: WorkerProcess, *signals: signal.Signals) -> tuple[int, float]:
    """Exit status, and seconds from the first signal to the end."""
    began = time.monotonic()
    for number in signals:
        worker.process.send_signal(number)
        time.sleep(0.2)
    return worker.process.wait(120), time.monotonic() - began


@row(
    "F7",
    injection="SIGTERM at a random moment with 2 batches running and others queued",
    expected="exit 0 ≤ batch + 5 s; running ones finish once, prefetched ones are back in the queue at once, 0 lost",
)
def test_sigterm_finishes_what_runs_and_hands_back_the_rest(
    deploy: Deploy,
    migrated_postgres_url: str,
    slow_jobs: dict[str, str],
    redis_server: RedisServer,
    fault_rng: random.Random,
    seen: Seen,
    bar: Bar,
) -> None:
    deployment = deploy(migrated_postgres_url, **slow_jobs)
    ids = deployment.enqueue(deployment.images(512), metadata={"seconds": 0.02})
    worker = _ready(deployment, 1)
    time.sleep(fault_rng.uniform(0.0, 1.0))
    status, took_s = _stopped(worker, signal.SIGTERM)
    waiting, held = _in_the_broker(redis_server)
    counts = deployment.counts()
    assert (status, held) == (0, 0)
    assert "running" not in counts, "what was claimed was finished"
    assert waiting * 64 >= counts["accepted"] > 0, "what was not, waits for the next worker"
    assert took_s < bar(_BATCH_S + 5)
    deployment.worker()
    wait_until(lambda: deployment.decided(ids) == len(ids), 120, "all verdicts")
    again = deployment.operations().executed_again
    assert again == 0
    seen(exit=status, exit_s=took_s, back_in_the_queue=waiting, lost=0, judged_again=again)


@pytest.mark.slow(reason="a worker for each way to stop one")
@row(
    "F8",
    injection="SIGINT, SIGQUIT, SIGTERM twice, each to a worker with batches running and queued",
    expected="0 lost, one verdict each",
)
def test_no_signal_loses_a_job(
    deploy: Deploy, sqlite_url: str, slow_jobs: dict[str, str], redis_server: RedisServer, seen: Seen
) -> None:
    # A short lease: a process that is cut down leaves its claims to lapse, as no supervisor frees them here.
    deployment = deploy(sqlite_url, **slow_jobs, CODE_WORKER_WORKER__LEASE_S="5")
    # What Celery says when it is to end threads, which cannot be ended.
    deployment.tolerated |= {"Unrecoverable error: NotImplementedError"}
    ids = deployment.enqueue(deployment.images(512), metadata={"seconds": 0.02})
    ways = {
        "sigint": (signal.SIGINT,),
        "sigquit": (signal.SIGQUIT,),
        "sigterm_twice": (signal.SIGTERM, signal.SIGTERM),
    }
    statuses: dict[str, int] = {}
    for lives, (name, signals) in enumerate(ways.items(), 1):
        statuses[f"{name}_status"], _ = _stopped(_ready(deployment, lives), *signals)
    assert deployment.unfinished(), "the test wants work left over"
    deployment.worker()
    wait_until(lambda: deployment.decided(ids) == len(ids), 120, f"all verdicts: {deployment.counts()}")
    seen(**statuses, lost=0)


@row(
    "F8",
    injection="REMAP_SIGTERM=SIGQUIT with the pool solo, under which the signal loses the running job",
    expected="start refused with status 2",
)
def test_a_remapped_sigterm_with_the_solo_pool_is_refused(
    deploy: Deploy, sqlite_url: str, redis_server: RedisServer, seen: Seen, tmp_path: Path
) -> None:
    deployment = deploy(sqlite_url, CODE_WORKER_BROKER__KEY_PREFIX="null", THEIRS_DIRECTORY=str(tmp_path))
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "tests.worker.foreign_app",
        "worker",
        "--pool",
        "solo",
        "-Q",
        LIVE,
    ]
    environment = {**os.environ, **deployment.environment, "REMAP_SIGTERM": "SIGQUIT"}
    refused = WorkerProcess(command, environment, deployment.log_path)
    status = refused.process.wait(120)
    refused.kill()
    assert status == 2
    assert "REMAP_SIGTERM=SIGQUIT with the pool solo" in deployment.log_path.read_text()
    seen(status=status)


@row(
    "F35",
    injection="SIGTERM while a worker downloads its release from S3 at 300 kB/s",
    expected="exit ≤ 10 s, no partial file under the final name",
)
def test_sigterm_during_a_download_leaves_nothing_half_there(
    deploy: Deploy,
    sqlite_url: str,
    redis_server: RedisServer,
    s3_server: S3Server,
    small_release_dir: Path,
    seen: Seen,
    bar: Bar,
) -> None:
    deployment = deploy(sqlite_url)
    s3_server.client().create_bucket(Bucket="slow-releases")
    deployment.environment |= s3_server.environment | {"CODE_WORKER_ARTIFACTS": "s3://slow-releases/kept"}
    promote_release(deployment, small_release_dir)
    with TcpProxy(s3_server.port) as link:
        link.throttle(300_000)
        endpoint = f"http://127.0.0.1:{link.port}"
        data = Path(deployment.environment["CODE_WORKER_DATA_DIR"])
        worker = deployment.worker(CODE_WORKER_S3__ENDPOINT_URL=endpoint, CODE_WORKER_DATA_DIR=str(data / "fresh"))
        cache = data / "fresh" / "cache" / "releases"
        wait_until(lambda: any(cache.glob(".incomplete/**/*.safetensors*")), 120, "a download")
        status, took_s = _stopped(worker, signal.SIGTERM)
    left = sorted(path.name for path in cache.rglob("*") if path.suffix != ".lock" and path.name != ".incomplete")
    assert (status, left) == (0, [])
    assert took_s < bar(10)
    seen(exit=status, exit_s=took_s, files_left=len(left))
