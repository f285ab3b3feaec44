"""A worker outlives the Redis server; kombu 5.7.0's own transport exits when it restarts under a busy worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from kombu import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from code_worker.broker import REDIS_TRANSPORT, transport_options
from code_worker.queues import BACKFILL, LIVE, NORMAL, SWEEP_QUEUE
from code_worker.settings import Settings
from code_worker.worker.transport import QueuesInOrder
from tests.servers import RedisServer


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
