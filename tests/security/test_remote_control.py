"""Remote control and events, for those who switch them on: what monitors may do then, and with which rights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pydantic import SecretStr

from code_worker.settings import Settings
from code_worker.store.engine import Store
from code_worker.wire import TRAIN_QUEUE
from code_worker.worker.app import create_app
from tests.security.deployment import ACL, CANARIES, GuardedRedis
from tests.worker.harness import Deployment, environment_in, wait_until

REMOTE = ACL.with_name("remote-control.acl")


class WatchedRedis(GuardedRedis):
    """With the users of both files; one of the second replaces that of the first."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        lines = [*self._users.read_text().splitlines(), *REMOTE.read_text().splitlines()]
        users = {line.split()[1]: line for line in lines}
        text = "\n".join(users.values()).replace("WORKER_PASSWORD", CANARIES["worker"])
        self._users.write_text(f"{text}\n", encoding="utf-8")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[WatchedRedis]:
    with WatchedRedis(tmp_path) as server:
        yield server


@pytest.fixture
def start(tmp_path: Path, broker: WatchedRedis, sqlite_store: Store) -> Iterator[Callable[[str], Deployment]]:
    """A trainer: the part that starts soonest."""
    made: list[Deployment] = []

    def run(allowed: str) -> Deployment:
        environment = environment_in(tmp_path, sqlite_store.url, broker.url_of("worker"))
        environment["CODE_WORKER_WORKER__REMOTE_CONTROL"] = allowed
        made.append(deployment := Deployment(environment, tmp_path / "workers.log"))
        deployment.worker(module="code_worker.stack.trainer_process")
        return deployment

    yield run
    for each in made:
        each.close()


@pytest.fixture
def monitor(broker: WatchedRedis, tmp_path: Path) -> Iterator[Celery]:
    # As a worker's user: each consumer of Redis puts back what a dead one held, monitors not excepted.
    settings = Settings(data_dir=tmp_path, broker_url=SecretStr(broker.url_of("worker")))
    with closing(create_app(settings)) as app:
        yield app


def asked(monitor: Celery, command: str) -> dict[str, Any]:
    answers = monitor.control.inspect(timeout=1)._request(command) or {}
    return dict(answers)


def first_event(monitor: Celery) -> str:
    """Type of the first event of a worker's."""
    seen: list[str] = []

    def take(event: dict[str, Any]) -> None:
        seen.append(event["type"])
        receiver.should_stop = True

    with monitor.connection_for_read() as connection:
        receiver = monitor.events.Receiver(connection, handlers={"*": take})
        receiver.capture(limit=None, timeout=60, wakeup=False)
    return seen[0]


def test_a_monitor_that_may_look_sees_workers_and_ends_none(
    start: Callable[[str], Deployment], monitor: Celery, broker: WatchedRedis
) -> None:
    deployment = start("inspect")
    (name,) = wait_until(lambda: asked(monitor, "ping"), 120, "an answer")
    broker.denied()
    assert [queue["name"] for queue in asked(monitor, "active_queues")[name]] == [TRAIN_QUEUE]
    assert first_event(monitor).startswith("worker-")
    for command in ("shutdown", "pool_grow", "cancel_consumer", "revoke", "conf", "report", "memdump"):
        monitor.control.broadcast(command)
        assert "ok" not in str(asked(monitor, command).get(name, "")).split()
    # With this one workers tell each other which tasks are revoked.
    monitor.control.broadcast("hello", arguments={"from_node": "somebody", "revoked": {"a-task": 1.0}})
    assert asked(monitor, "revoked") == {name: []}
    assert asked(monitor, "ping") == {name: {"ok": "pong"}}
    assert deployment.workers[0].alive
    assert "canary" not in deployment.log_path.read_text(encoding="utf-8")
    assert broker.denied() == [], "worker and monitor do with their rights"


def test_one_that_may_do_all_ends_a_worker_and_learns_no_password(
    start: Callable[[str], Deployment], monitor: Celery
) -> None:
    deployment = start("all")
    (name,) = wait_until(lambda: asked(monitor, "ping"), 120, "an answer")
    assert "canary" not in str(asked(monitor, "conf").get(name))
    monitor.control.shutdown(destination=[name])
    assert deployment.workers[0].process.wait(120) == 0
