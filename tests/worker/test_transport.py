"""A worker outlives the Redis server; kombu 5.7.0's own transport exits when it restarts under a busy worker."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
from kombu import Connection, Producer, Queue
from redis.exceptions import ConnectionError as RedisConnectionError

from code_worker.broker import REDIS_TRANSPORT, transport_options
from code_worker.settings import Settings
from code_worker.wire import BACKFILL, LIVE, NORMAL, SWEEP_QUEUE
from code_worker.worker.kombu_redis import QueuesInOrder
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


@pytest.mark.parametrize("hours", [1, -1])
def test_messages_are_kept_account_of_by_the_clock_of_redis(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    options = transport_options(Settings(data_dir=tmp_path))
    right = time.time
    with (
        Connection(redis_server.url, transport=REDIS_TRANSPORT, transport_options=options) as connection,
        redis.Redis.from_url(redis_server.url) as server,
    ):
        channel = connection.default_channel
        queue = Queue("theirs", channel=channel)
        queue.declare()
        Producer(channel).publish({"a": 1}, routing_key="theirs")
        for clock in ("time.time", "kombu.transport.redis.time"):
            monkeypatch.setattr(clock, lambda: right() + 3600 * hours)
        message = queue.get()
        ((tag, dated),) = server.zrange("cw:unacked_index", 0, -1, withscores=True)
        seconds, _ = server.time()
        assert dated == pytest.approx(seconds, abs=30)
        channel.qos.restore_visible(num=100, interval=1)
        assert server.hkeys("cw:unacked") == [tag], "nobody takes what is held for abandoned"
        server.zadd("cw:unacked_index", {tag: seconds - options["visibility_timeout"] - 5})
        channel.qos.restore_visible(num=100, interval=1)
        assert server.hkeys("cw:unacked") == []
        assert server.llen("cw:theirs") == 1
        message.ack()


def test_queues_are_asked_in_order_of_urgency() -> None:
    cycle = QueuesInOrder()
    cycle.update(["theirs", BACKFILL, SWEEP_QUEUE, NORMAL, LIVE])
    assert cycle.consume(5) == [LIVE, NORMAL, BACKFILL, "theirs", SWEEP_QUEUE]
    cycle.rotate("theirs")
    assert cycle.consume(5) == [LIVE, NORMAL, BACKFILL, SWEEP_QUEUE, "theirs"]
