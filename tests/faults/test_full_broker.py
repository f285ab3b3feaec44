"""A broker that can take nothing any more: producers and workers live, and all goes on when there is room."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest
import redis

from tests.faults.deployment import FaultDeployment
from tests.faults.rows import Bar, Seen, row
from tests.servers import RedisServer, wait_for_port
from tests.worker.harness import wait_until

Deploy = Callable[..., FaultDeployment]


class DurableRedis(RedisServer):
    """With an append-only file in a directory whose room can be taken away."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def command(self) -> list[str]:
        command = super().command()
        command[command.index("--appendonly") + 1] = "yes"
        return [*command, "--appendfsync", "everysec", "--dir", str(self.directory)]

    def start(self) -> Self:
        # Python ignores the signal of a file that grows too large; the server inherits that and sees an error.
        self.process = subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            restore_signals=False,
        )
        wait_for_port(self.port, self.process)
        return self

    def limit(self, largest_file: int) -> None:
        assert self.process is not None
        psutil.Process(self.process.pid).rlimit(psutil.RLIMIT_FSIZE, (largest_file, psutil.RLIM_INFINITY))


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[DurableRedis]:
    (tmp_path / "redis").mkdir()
    with DurableRedis(tmp_path / "redis") as server:
        yield server


def _fill_memory(server: DurableRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")


def _free_memory(server: DurableRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "0")


def _fill_disk(server: DurableRedis) -> None:
    server.limit(1)
    with redis.Redis.from_url(server.url) as client:

        def full() -> bool:
            try:
                client.set("filler", "x" * 10_000)
            except redis.ResponseError:
                return True
            return False

        wait_until(full, 120, "the server to refuse writes")


def _free_disk(server: DurableRedis) -> None:
    server.limit(psutil.RLIM_INFINITY)


@pytest.mark.nightly
@row(
    "F6",
    injection="the broker's {what} full for 15 s",
    expected="enqueue returns ids, no process ends, healed ≤ 10 s after there is room, 0 lost",
)
@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_full_broker_is_outlived(
    deploy: Deploy, migrated_postgres_url: str, redis_server: DurableRedis, seen: Seen, bar: Bar, what: str
) -> None:
    fill, free = (_fill_memory, _free_memory) if what == "memory" else (_fill_disk, _free_disk)
    deployment = deploy(migrated_postgres_url)
    # Celery's way to say that it slows its attempts down.
    deployment.tolerated |= {"Frequent restarts detected", "Error in timer: server:OutOfMemoryError"}
    worker = deployment.worker()
    deployment.started()
    uris = deployment.images(32)
    first = deployment.enqueue(uris[:1])
    wait_until(lambda: deployment.decided(first), 120, "a first verdict")
    fill(redis_server)
    began = time.monotonic()
    ids = deployment.enqueue(uris)
    accepted_s = time.monotonic() - began
    time.sleep(15)
    assert worker.alive
    free(redis_server)
    began = time.monotonic()
    wait_until(lambda: deployment.decided(ids), bar(10), "a verdict after there is room")
    healed_s = time.monotonic() - began
    wait_until(lambda: deployment.decided(ids) == len(ids), 120, "all verdicts")
    assert worker.alive
    seen(enqueue_returned_after_s=accepted_s, exits=0, healed_s=healed_s, lost=0)
