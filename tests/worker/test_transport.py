"""A worker outlives the Redis server; kombu 5.7.0's own transport exits when it restarts under a busy worker."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kombu import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from code_worker.broker import REDIS_TRANSPORT, transport_options
from code_worker.queues import BACKFILL, LIVE, NORMAL, SWEEP_QUEUE
from code_worker.settings import Settings
from code_worker.types import Outcome
from code_worker.worker.transport import QueuesInOrder
from tests.servers import RedisServer
from tests.worker.harness import Deployment, jpeg, wait_until


def test_a_detached_channel_reports_a_lost_connection(redis_server: RedisServer, tmp_path: Path) -> None:
    options = transport_options(Settings(data_dir=tmp_path))
    with Connection(redis_server.url, transport=REDIS_TRANSPORT, transport_options=options) as connection:
        channel = connection.default_channel
        channel.connection.client = None
        with pytest.raises(RedisConnectionError, match="detached"):
            channel._connparams()
        assert issubclass(RedisConnectionError, connection.transport.connection_errors)
        channel.connection.client = connection


def test_queues_are_asked_in_order_of_urgency() -> None:
    cycle = QueuesInOrder()
    cycle.update(["theirs", BACKFILL, SWEEP_QUEUE, NORMAL, LIVE])
    assert cycle.consume(5) == [LIVE, NORMAL, BACKFILL, "theirs", SWEEP_QUEUE]
    cycle.rotate("theirs")
    assert cycle.consume(5) == [LIVE, NORMAL, BACKFILL, SWEEP_QUEUE, "theirs"]


def test_a_partly_busy_worker_outlives_redis_restarts(
    deploy: Callable[..., Deployment], tmp_path: Path, redis_server: RedisServer
) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "slow.py").write_text(
        "import time\n"
        "from code_worker import hookimpl\n"
        "@hookimpl\n"
        "def code_worker_select_head(job, heads):\n"
        "    time.sleep(job.metadata.get('seconds', 0))\n"
    )
    deployment = deploy(f"sqlite:///{tmp_path / 'db.sqlite'}", CODE_WORKER_PLUGINS_DIR=str(plugins))
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(1))
    uri = str(tmp_path / "files" / "a.jpg")
    worker = deployment.worker("--concurrency", "4")
    wait_until(lambda: deployment.events("worker_starting"), 60, "a worker")
    client = deployment.client()
    rng = random.Random(7)
    for _ in range(4):
        # One slot busy and three waiting in BRPOP: the state in which the plain transport exits.
        slow = client.enqueue(uri, metadata={"seconds": 2.0})
        wait_until(lambda: _running(deployment), 30, "a busy slot")
        redis_server.kill()
        threading.Event().wait(rng.uniform(0.2, 1.0))
        redis_server.start()
        began = time.monotonic()
        after = client.enqueue(uri)
        verdict = wait_until(lambda job=after: client.verdict(job), 40, "a verdict after the restart")
        print(f"first verdict {time.monotonic() - began:.1f} s after Redis was back")
        assert verdict.outcome is Outcome.JUDGED
        assert worker.alive
        assert wait_until(lambda job=slow: client.verdict(job), 40, "the slow one's verdict")
    assert worker.terminate() == 0


def _running(deployment: Deployment) -> bool:
    with deployment.store().engine.connect() as connection:
        return bool(connection.exec_driver_sql("select count(*) from jobs where state='running'").scalar_one())
