"""A worker and a scheduler under the broker's own rules: what they may do, what reaches them, what leaks."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection, Exchange, Queue
from sqlalchemy import make_url

from code_worker.client import Client
from code_worker.plugins import load_plugins
from code_worker.publisher import Publisher
from code_worker.releases.registry import open_registry
from code_worker.store import workers
from code_worker.types import Outcome, RejectReason
from code_worker.wire import MODERATE, NORMAL, REFIT, SWEEP, SWEEP_QUEUE, TRAIN_QUEUE, jobs_message
from code_worker.worker.app import create_app
from tests.security.deployment import (
    CANARIES,
    GuardedRedis,
    everything_held_by,
    everything_in,
    make_deployment,
    run_cli,
    secret_fields,
)
from tests.servers import PostgresServer, S3Server
from tests.worker.harness import Deployment, WorkerProcess, jpeg, wait_until

PREFIX = "cw:"
LEAKY = f"https://u:{CANARIES['in a URI']}@h/a.jpg?X-Amz-Signature={CANARIES['in a URI']}"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    with GuardedRedis(tmp_path_factory.mktemp("broker")) as server:
        yield server


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: PostgresServer,
    s3_server: S3Server,
    broker: GuardedRedis,
    toy_release_dir: Path,
) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("deployment")
    s3_server.client().create_bucket(Bucket="canaries")
    s3_server.client().put_object(Bucket="canaries", Key="good.jpg", Body=jpeg(1))
    s3_server.client().put_object(Bucket="canaries", Key="bad.jpg", Body=b"no image")
    made = make_deployment(directory, postgres_server.new_database(), broker, s3_server, "canaries")
    registry = open_registry(made.settings, store=made.store(), plugins=load_plugins(made.settings))
    registry.promote(registry.add(toy_release_dir), by="test")
    yield made
    made.close()


@pytest.fixture(scope="module")
def worker(deployment: Deployment) -> WorkerProcess:
    started = deployment.worker()
    wait_until(lambda: deployment.events("worker_starting"), 120, "the worker starts")
    (in_use,) = deployment.events("plugins_in_use")
    assert any("'code_worker_heads' of code-worker" in plugin for plugin in in_use["plugins"])
    return started


def as_role(deployment: Deployment, broker: GuardedRedis, role: str) -> Any:
    return deployment.settings.model_copy(
        update={"broker_url": type(deployment.settings.broker_url)(broker.url_of(role))}  # type: ignore[misc]
    )


@pytest.fixture
def producer(deployment: Deployment, broker: GuardedRedis) -> Iterator[Client]:
    with closing(Client(as_role(deployment, broker, "producer"))) as client:
        yield client


def wait_for(client: Client, job_id: str) -> Any:
    return wait_until(lambda: client.verdict(job_id), 120, "a verdict")


def test_every_setting_that_is_a_secret_has_a_canary(deployment: Deployment) -> None:
    for name in secret_fields():
        value = deployment.environment[f"CODE_WORKER_{name}"]
        assert any(canary in value for canary in CANARIES.values()), name


def test_producer_worker_and_scheduler_do_with_their_rights(
    deployment: Deployment, broker: GuardedRedis, producer: Client, worker: WorkerProcess
) -> None:
    broker.denied()
    ids = [producer.enqueue("s3://canaries/good.jpg"), *producer.enqueue_many(["s3://canaries/bad.jpg"], priority=9)]
    found = [wait_for(producer, job_id) for job_id in ids]
    assert [verdict.outcome for verdict in found] == [Outcome.JUDGED, Outcome.REJECTED]
    beat = deployment.worker(
        module="code_worker.stack.beat_process",
        CODE_WORKER_BROKER_URL=broker.url_of("beat"),
        CODE_WORKER_SCHEDULE__REFIT="* * * * *",
    )
    with closing(broker.admin()) as admin:
        wait_until(lambda: admin.exists(f"{PREFIX}redbeat:{REFIT}"), 120, "the schedule is written")
    with closing(Publisher.for_producer(as_role(deployment, broker, "beat"))) as publisher:
        publisher.call(SWEEP, SWEEP_QUEUE)
    assert beat.alive
    assert beat.terminate() == 0
    with closing(Publisher.for_producer(deployment.settings)) as publisher:
        publisher.mark()
        assert publisher.marked()
        publisher.call(REFIT, TRAIN_QUEUE)
        assert publisher.depth(TRAIN_QUEUE) == 1
    assert broker.denied() == []


@pytest.mark.parametrize(
    ("role", "commands"),
    [
        (
            "producer",
            [
                f"BRPOP {PREFIX}{NORMAL} 1",
                f"RPOP {PREFIX}{NORMAL}",
                f"LRANGE {PREFIX}{NORMAL} 0 -1",
                f"DEL {PREFIX}{NORMAL}",
                f"HGETALL {PREFIX}unacked",
                f"GET {PREFIX}redbeat::lock",
                "EVAL return(1) 0",
            ],
        ),
        ("beat", [f"BRPOP {PREFIX}{NORMAL} 1", f"LRANGE {PREFIX}{NORMAL} 0 -1", f"HGETALL {PREFIX}unacked"]),
        ("worker", []),
    ],
)
def test_nobody_may_do_more(broker: GuardedRedis, role: str, commands: list[str]) -> None:
    everybody = [
        *(
            "FLUSHALL",
            "FLUSHDB",
            "CONFIG GET *",
            "CONFIG SET appendonly no",
            "KEYS *",
            "SHUTDOWN NOSAVE",
        ),
        *("ACL LIST", "ACL WHOAMI", "MODULE LIST", "MONITOR", "SAVE", "REPLICAOF 127.0.0.1 1", "SCRIPT FLUSH"),
        *("PUBLISH /0.celery.pidbox x", "SUBSCRIBE /0.celery.pidbox", "LPUSH elsewhere x", "GET elsewhere"),
        f"LPUSH {PREFIX[:-1]}x:code_worker.normal x",
    ]
    with closing(redis.Redis.from_url(broker.url_of(role), protocol=2)) as client:
        for command in (*everybody, *commands):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
    broker.denied()


def test_strangers_may_nothing(broker: GuardedRedis) -> None:
    for password in (None, "wrong"):
        with (
            closing(redis.Redis(port=broker.port, password=password)) as client,
            pytest.raises(redis.exceptions.AuthenticationError),
        ):
            client.ping()


def send_raw(broker: GuardedRedis, body: bytes, *, content_type: str, encoding: str = "binary") -> None:
    """A message as Celery's own, but for its body."""
    headers = {"lang": "py", "task": MODERATE, "id": "0198c5a2-7f31-7abc-9def-0123456789ab", "root_id": None}
    url = f"redis://test:test@127.0.0.1:{broker.port}/0"
    with Connection(url, transport_options={"global_keyprefix": PREFIX}) as connection:
        channel = connection.channel()
        queue = Queue(NORMAL, Exchange(NORMAL), routing_key=NORMAL)(channel)
        queue.declare()
        connection.Producer(channel).publish(
            body,
            exchange=queue.exchange,
            routing_key=NORMAL,
            content_type=content_type,
            content_encoding=encoding,
            headers={**headers, "argsrepr": "()", "kwargsrepr": "{}"},
        )


class _Plant:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_pickles_yaml_and_msgpack_are_refused_and_the_worker_lives(
    deployment: Deployment, broker: GuardedRedis, producer: Client, worker: WorkerProcess, tmp_path: Path
) -> None:
    trace = tmp_path / "executed"
    arguments = ((jobs_message(["a"]), _Plant(trace)), {}, {})
    yaml = f"!!python/object/apply:os.mkdir ['{trace}']".encode()
    offered = {
        "application/x-python-serialize": pickle.dumps(arguments),
        "application/x-yaml": yaml,
        "application/x-msgpack": b"\x93\x90\x80\x80",
        "text/plain": b"[[], {}, {}]",
    }
    for content_type, body in offered.items():
        send_raw(broker, body, content_type=content_type)
    send_raw(broker, pickle.dumps(arguments), content_type="application/json", encoding="utf-8")
    assert wait_for(producer, producer.enqueue("s3://canaries/good.jpg")).outcome is Outcome.JUDGED
    assert worker.alive
    assert not trace.exists()
    refused = [event for event in deployment.log() if "Refusing to deserialize" in json.dumps(event)]
    assert len(refused) >= 3


def test_remote_control_and_events_are_off(
    deployment: Deployment, broker: GuardedRedis, producer: Client, worker: WorkerProcess
) -> None:
    with closing(broker.admin()) as admin:
        assert admin.pubsub_channels() == []
        assert [key for key in admin.keys("*") if b"pidbox" in key or b"celeryev" in key] == []
    own = deployment.settings.model_copy(
        update={"broker_url": type(deployment.settings.broker_url)(f"redis://test:test@127.0.0.1:{broker.port}/0")}
    )
    app = create_app(own)
    assert app.conf.worker_enable_remote_control is False
    assert app.conf.worker_send_task_events is False
    assert app.conf.task_send_sent_event is False
    for command in ("shutdown", "pool_shrink", "rate_limit"):
        app.control.broadcast(command)
    assert app.control.ping(timeout=0.5) == []
    app.close()
    assert wait_for(producer, producer.enqueue("s3://canaries/good.jpg")).outcome is Outcome.JUDGED
    assert worker.alive


@pytest.mark.slow(reason="runs every command that may print a setting")
def test_no_secret_leaves_the_settings(
    deployment: Deployment, broker: GuardedRedis, producer: Client, worker: WorkerProcess, s3_server: S3Server
) -> None:
    uris = {
        "s3://canaries/missing.jpg": RejectReason.NOT_FOUND,
        "s3://elsewhere/a.jpg": RejectReason.SOURCE_NOT_ALLOWED,
        "s3://canaries/bad.jpg": RejectReason.UNSUPPORTED_FORMAT,
        "/etc/passwd": RejectReason.SOURCE_NOT_ALLOWED,
        "http://127.0.0.1/a.jpg": RejectReason.SOURCE_NOT_ALLOWED,
    }
    assert {uri: wait_for(producer, producer.enqueue(uri)).reason for uri in uris} == uris
    with pytest.raises(ValueError, match="carries a password or a signature"):
        producer.enqueue(LEAKY)
    with closing(Publisher.for_producer(as_role(deployment, broker, "producer"))) as publisher:
        publisher._app.send_task(
            MODERATE, args=({"v": 1, "items": [{"uri": LEAKY}]},), queue=NORMAL, serializer="json"
        )
    wait_until(lambda: deployment.events("message_refused"), 120, "the message is set aside")
    said = everything_said(deployment, broker)
    assert {what for what, text in said.items() if not text.strip()} == set()
    kept = {"the log": deployment.log_path.read_text(), "the database": everything_in(deployment.store()), **said}
    kept["the broker"] = everything_held_by(broker)
    assert "verdicts: (" in kept["the database"]
    leaks = {(where, name) for where, text in kept.items() for name, canary in CANARIES.items() if canary in text}
    assert leaks == set()


def everything_said(deployment: Deployment, broker: GuardedRedis) -> dict[str, str]:
    """What commands print, in order and out of order."""
    environment = deployment.environment
    elsewhere = make_url(environment["CODE_WORKER_DATABASE_URL"]).set(host="127.0.0.1", port=1, query={})
    wrong = {
        "CODE_WORKER_DATABASE_URL": elsewhere.render_as_string(hide_password=False),
        "CODE_WORKER_BROKER_URL": broker.url_of("worker").replace(f":{broker.port}", ":1"),
        "CODE_WORKER_S3__ENDPOINT_URL": "http://127.0.0.1:1",
    }
    parts = ("settings", "broker", "s3", "database", "release", "workers", "jobs", "sources")
    unreadable = {
        "CODE_WORKER_DATABASE_URL": f"postgresql+nonsense://u:{CANARIES['database']}@h/d",
        "CODE_WORKER_BROKER_URL": f"redis+socket://u:{CANARIES['worker']}@h/0",
    }
    return {
        "doctor": run_cli(deployment, "doctor", *parts),
        "doctor of what is away": run_cli(deployment, "doctor", *parts, **wrong),
        "doctor of what cannot be": run_cli(deployment, "doctor", *parts, **unreadable),
        "db current": run_cli(deployment, "db", "current"),
        "db current of what is away": run_cli(deployment, "db", "current", **wrong),
        "db current of what cannot be": run_cli(deployment, "db", "current", **unreadable),
        "a wrong setting": run_cli(deployment, "db", "current", CODE_WORKER_S3__MAX_ATTEMPTS="many"),
        "enqueue": run_cli(deployment, "enqueue", "s3://canaries/good.jpg", **wrong),
        "enqueue with a secret": run_cli(deployment, "enqueue", LEAKY),
        "audit": run_cli(deployment, "audit", "list"),
    }


def test_a_refused_message_is_kept_without_its_secrets(deployment: Deployment) -> None:
    letters = deployment.store().run(lambda session: workers.list_dead_letters(session, limit=10), write=False)
    assert any("***" in letter.body for letter in letters)
