"""Publishing and looking how many messages wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import amqp
import pytest
import redis
from amqp.exceptions import PreconditionFailed
from celery import Celery
from kombu import Exchange, Queue
from kombu.transport import memory

from code_worker.errors import BrokerUnavailableError
from code_worker.publisher import Publisher, bound_queue
from code_worker.settings import BrokerSettings, Settings, load_settings
from code_worker.wire import LIVE, MODERATE, NORMAL, RETRAIN, TRAIN_QUEUE
from code_worker.worker.app import create_app, install
from code_worker.worker.launch_checks import Bystander
from tests.servers import RedisServer


@pytest.fixture
def publisher(redis_server: RedisServer, tmp_path: Path) -> Iterator[Publisher]:
    publisher = Publisher.for_producer(Settings(data_dir=tmp_path, broker_url=redis_server.url))
    yield publisher
    publisher.close()


def test_depth_counts_what_was_rung(publisher: Publisher) -> None:
    assert publisher.depth(NORMAL) == 0
    for number in range(5):
        publisher.publish(NORMAL, [f"job-{number}"])
    assert (publisher.depth(NORMAL), publisher.depth(LIVE)) == (5, 0)


def test_a_broker_that_is_gone_is_reported_and_a_new_one_is_used(
    publisher: Publisher, redis_server: RedisServer
) -> None:
    publisher.publish(NORMAL, ["a"])
    redis_server.kill()
    with pytest.raises(BrokerUnavailableError):
        publisher.publish(NORMAL, ["b"])
    with pytest.raises(BrokerUnavailableError):
        publisher.depth(NORMAL)
    redis_server.start()
    publisher.publish(NORMAL, ["c"])
    assert publisher.depth(NORMAL) == 1


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("prefix", ["cw:", ""])
def test_what_a_worker_took_and_did_not_acknowledge_is_held(
    redis_server: RedisServer,
    tmp_path: Path,
    prefix: str,
    compression: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(data_dir=tmp_path, broker_url=redis_server.url, broker=BrokerSettings(key_prefix=prefix))
    app = create_app(settings)
    app.conf.task_compression = compression
    publisher = Publisher(app)
    publisher.publish(NORMAL, ["taken", "and its neighbour"])
    assert publisher.held(["taken"]) == set(), "it waits"
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        message = bound_queue(NORMAL)(channel).get()
        publisher.publish(NORMAL, ["waiting"])
        assert publisher.depth(NORMAL) == 1
        assert publisher.held(["taken", "waiting", "unknown"]) == {"taken"}
        with monkeypatch.context() as few:
            few.setattr("code_worker.publisher._MOST_HELD", 0)
            assert publisher.held(["waiting"]) == {"waiting"}, "nobody looked at all of them"
        message.ack()
        assert publisher.held(["taken"]) == set()
    app.close()


def astray(*_: object, **__: object) -> dict[str, object]:
    return {"queue": "theirs", "exchange": "theirs", "routing_key": "theirs.x", "exchange_type": "topic"}


HOSTILE = [
    {"task_routes": {"*": astray()}},
    {"task_routes": astray},
    {"task_routes": {"code_worker.*": {"queue": "theirs"}}},
    {
        "task_default_exchange": "theirs",
        "task_default_exchange_type": "topic",
        "task_default_routing_key": "theirs.x",
    },
    {"task_queues": [Queue("theirs")], "task_default_queue": "theirs", "task_create_missing_queues": False},
    {"task_create_missing_queue_exchange_type": "topic"},
    {"task_protocol": 1},
    {"task_serializer": "yaml", "task_compression": "gzip"},
    {"task_default_priority": 9, "task_default_delivery_mode": "transient", "task_ignore_result": False},
]


@pytest.mark.parametrize("conf", HOSTILE, ids=lambda conf: next(iter(conf)))
def test_what_we_publish_goes_to_our_queues_whatever_an_app_sets_for_its_own(
    conf: dict[str, object], redis_server: RedisServer
) -> None:
    app = install(Celery("theirs", broker=redis_server.url, backend=redis_server.url, set_as_current=False))
    app.conf.update(conf)
    publisher = Publisher(app)
    publisher.publish(NORMAL, ["a", "b"])
    publisher.call(RETRAIN, TRAIN_QUEUE, arguments={"by": "me"})
    assert (publisher.depth(NORMAL), publisher.depth(TRAIN_QUEUE)) == (1, 1)
    with app.connection() as connection:
        message = bound_queue(NORMAL)(connection.default_channel).get()
        assert message.content_type == "application/json"
        assert (message.properties["delivery_mode"], message.properties["priority"]) == (2, 0)
        body = message.decode()
        arguments = body["args"] if isinstance(body, dict) else body[0]
        assert arguments == [{"v": 1, "jobs": ["a", "b"]}]
        assert (body["task"] if isinstance(body, dict) else message.headers["task"]) == MODERATE
        message.ack()
    app.close()


@pytest.mark.parametrize("prefix", ["", "theirs:"])
def test_bindings_that_an_earlier_version_left_are_taken_away(prefix: str, redis_server: RedisServer) -> None:
    app = Celery("theirs", broker=redis_server.url, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": prefix}
    install(app)
    exchange = Exchange("tasks", type="topic")
    with app.connection() as connection:
        channel = connection.default_channel
        for name in ("theirs", NORMAL, LIVE):
            Queue(name, exchange, "task.default")(channel).declare()
        publisher = Publisher(app)
        assert publisher.unbind("tasks", [NORMAL, TRAIN_QUEUE]) == [NORMAL]
        assert {binding[-1] for binding in channel.get_table("tasks")} == {"theirs", LIVE}
        assert publisher.unbind("tasks", [NORMAL, TRAIN_QUEUE]) == []
        connection.Producer(auto_declare=False).publish({}, exchange="tasks", routing_key="task.default")
        assert [Queue(name)(channel).queue_declare().message_count for name in ("theirs", NORMAL)] == [1, 0]
    app.close()


def test_a_worker_that_takes_none_of_our_queues_says_once_that_jobs_wait(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    app = install(Celery("theirs", broker=redis_server.url, set_as_current=False))
    publisher, bystander = Publisher(app), Bystander(app)
    for _ in range(2):
        bystander.look()
    publisher.publish(NORMAL, ["a"])
    bystander.look()
    assert "jobs_not_taken" not in caplog.text, "somebody else may be about to take them"
    for _ in range(3):
        bystander.look()
    (line,) = [record.getMessage() for record in caplog.records if "jobs_not_taken" in record.getMessage()]
    assert "'code_worker.normal': 1" in line
    assert "-Q code_worker.live,code_worker.normal" in line
    redis_server.kill()
    Bystander(app).look()
    app.close()


def test_a_producer_elsewhere_reaches_an_app_without_a_key_prefix(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE_WORKER_BROKER__KEY_PREFIX", "null")
    settings = load_settings(data_dir=tmp_path, broker_url=redis_server.url)
    publisher = Publisher.for_producer(settings)
    publisher.publish(NORMAL, ["a"])
    app = install(Celery("theirs", broker=redis_server.url, set_as_current=False))
    assert Publisher(app).depth(NORMAL) == 1
    publisher.close()
    app.close()


def test_workers_that_were_killed_long_ago_are_forgotten(redis_server: RedisServer) -> None:
    app = install(Celery("theirs", broker=redis_server.url, set_as_current=False))
    app.conf.broker_transport_options = {"global_keyprefix": "theirs:"}
    publisher, key = Publisher(app), "theirs:code_worker.bystanders"
    with redis.Redis.from_url(redis_server.url) as client:
        now = time.time()
        client.hset(key, mapping={"killed": str(now - 4000), "ahead": str(now + 4000), "lately": str(now - 600)})
        publisher.note_bystander("here")
        assert set(client.hkeys(key)) == {b"lately", b"here"}
        client.hset(key, "killed", str(now - 4000))
        assert publisher.bystanders(within_s=300) == ["here"]
        assert set(client.hkeys(key)) == {b"lately", b"here"}
    app.close()


class StrictChannel(memory.Channel):  # type: ignore[misc]  # kombu ships no types
    """Refuses a queue that is declared with other arguments than before, as RabbitMQ does."""

    declared: ClassVar[dict[str, dict[str, Any]]] = {}

    def queue_declare(self, queue: str, passive: bool = False, **options: Any) -> Any:
        given = {name: value for name, value in options.items() if name != "nowait"}
        if not passive and self.declared.setdefault(queue, given) != given:
            raise PreconditionFailed(f"inequivalent arg for queue {queue!r}: {given}, not {self.declared[queue]}")
        return super().queue_declare(queue=queue, passive=passive, **options)


class StrictTransport(memory.Transport):  # type: ignore[misc]  # as above
    Channel = StrictChannel
    connection_errors = amqp.Connection.connection_errors
    channel_errors = amqp.Connection.channel_errors
    recoverable_connection_errors = amqp.Connection.recoverable_connection_errors
    recoverable_channel_errors = amqp.Connection.recoverable_channel_errors


QUEUES_AS_THEIRS = [
    {"task_queue_max_priority": 10},
    {"task_create_missing_queue_type": "quorum"},
    {"task_queues": [Queue("theirs"), Queue(NORMAL, queue_arguments={"x-max-priority": 5}, durable=False)]},
    {"task_queues": [Queue(NORMAL, Exchange("x", type="topic"), "a.#", queue_arguments={"x-queue-type": "quorum"})]},
]


@pytest.mark.parametrize("first", ["worker", "producer"])
@pytest.mark.parametrize("conf", QUEUES_AS_THEIRS, ids=["priorities", "quorum", "listed", "bound"])
def test_our_queues_are_declared_as_workers_of_their_app_declare_them(conf: dict[str, object], first: str) -> None:
    StrictChannel.declared.clear()
    # By a name of its own: kombu remembers for each what it declared.
    app = install(Celery("theirs", broker=f"memory://{uuid4().hex}", set_as_current=False))
    app.conf.update(conf, broker_transport=StrictTransport)
    publisher = Publisher(app)

    def declared_by_a_worker() -> None:
        app.amqp.queues.select([NORMAL])
        with app.connection_for_read() as connection:
            app.amqp.TaskConsumer(connection.default_channel).close()

    for step in [declared_by_a_worker, lambda: publisher.publish(NORMAL, ["a"])][:: 1 if first == "worker" else -1]:
        step()
    assert publisher.depth(NORMAL) == 1
    assert StrictChannel.declared[NORMAL]["arguments"], "as theirs, and not bare"
    with app.connection_for_read() as connection:
        message = app.amqp.queues[NORMAL](connection.default_channel).get()
        assert message.delivery_info["exchange"] == "", "to this queue and to nobody else's"
        message.ack()
    app.close()


def test_a_queue_that_others_declared_otherwise_is_a_broker_that_does_not_take_the_message() -> None:
    StrictChannel.declared.clear()
    app = Celery("producer", broker=f"memory://{uuid4().hex}", set_as_current=False)
    app.conf.broker_transport = StrictTransport
    with app.connection_for_read() as connection:
        Queue(NORMAL, Exchange(NORMAL), queue_arguments={"x-queue-type": "quorum"})(connection.channel()).declare()
    with pytest.raises(BrokerUnavailableError, match="inequivalent arg"):
        Publisher(app, own=True).publish(NORMAL, ["a"])
    with pytest.raises(BrokerUnavailableError, match="inequivalent arg"):
        Publisher(app, own=True).depth(NORMAL)
    app.close()
