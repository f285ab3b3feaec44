"""Publishing and looking how many messages wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from code_worker.doorbell import Doorbell
from code_worker.errors import BrokerUnavailableError
from code_worker.queues import LIVE, NORMAL
from code_worker.settings import Settings
from tests.servers import RedisServer


@pytest.fixture
def doorbell(redis_server: RedisServer, tmp_path: Path) -> Iterator[Doorbell]:
    bell = Doorbell.for_producer(Settings(data_dir=tmp_path, broker_url=redis_server.url))
    yield bell
    bell.close()


def test_depth_counts_what_was_rung(doorbell: Doorbell) -> None:
    assert doorbell.depth(NORMAL) == 0
    for number in range(5):
        doorbell.ring(NORMAL, [f"job-{number}"])
    assert (doorbell.depth(NORMAL), doorbell.depth(LIVE)) == (5, 0)


def test_a_broker_that_is_gone_is_reported_and_a_new_one_is_used(
    doorbell: Doorbell, redis_server: RedisServer
) -> None:
    doorbell.ring(NORMAL, ["a"])
    redis_server.kill()
    with pytest.raises(BrokerUnavailableError):
        doorbell.ring(NORMAL, ["b"])
    with pytest.raises(BrokerUnavailableError):
        doorbell.depth(NORMAL)
    redis_server.start()
    doorbell.ring(NORMAL, ["c"])
    assert doorbell.depth(NORMAL) == 1
