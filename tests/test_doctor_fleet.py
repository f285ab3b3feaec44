"""What running parts say of themselves, and what `doctor` and `schedule list` make of it."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner

from code_worker._version import __version__
from code_worker.cli.learning.runs import schedule
from code_worker.client import Client
from code_worker.doctor import examine, fleet
from code_worker.doctor.check import Check, Status
from code_worker.plugins import load_plugins
from code_worker.publisher import Publisher, bound_queue
from code_worker.releases.registry import open_registry
from code_worker.settings import LimitSettings, Settings
from code_worker.stack import beat_process
from code_worker.store import jobs, workers
from code_worker.store.engine import Store
from code_worker.wire import LIVE, NORMAL, QUEUES, SWEEP_QUEUE, TRAIN_QUEUE
from code_worker.worker.app import create_app, install
from code_worker.worker.app_state import AppState
from code_worker.worker.background import Repeater, differing, facts
from code_worker.worker.launch_checks import Bystander
from tests.servers import RedisServer
from tests.worker.harness import wait_until

Make = Callable[..., Settings]


@pytest.fixture
def make(sqlite_store: Store, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Settings of one deployment, in which some part may have others."""
    monkeypatch.setenv("CODE_WORKER_DATABASE_URL", sqlite_store.url)
    monkeypatch.setenv("CODE_WORKER_BROKER_URL", redis_server.url)
    monkeypatch.setenv("CODE_WORKER_DATA_DIR", str(tmp_path))

    def build(**other: Any) -> Settings:
        return Settings(**other)

    return build


@pytest.fixture
def running() -> Iterator[Callable[..., AppState]]:
    """Duties of a worker in this process."""
    hosts: list[AppState] = []

    def start(settings: Settings, queues: frozenset[str], app: Celery | None = None) -> AppState:
        host = AppState(app or create_app(settings), lambda: settings)
        Publisher._installed = None  # producers are other processes
        hosts.append(host)
        if queues & {*QUEUES, SWEEP_QUEUE}:
            host.sweep()
        host.start_reporting(queues)
        return host

    yield start
    for host in hosts:
        host.close()


def found(part: str, **settings: Any) -> list[Check]:
    return list(examine([part], **settings))


def parts(store: Store) -> list[workers.WorkerInfo]:
    return store.run(lambda session: workers.alive(session, within_s=60, role=None), write=False)


def test_a_part_says_which_settings_it_runs_with_and_no_value_of_them(make: Make) -> None:
    said = json.loads(json.dumps(facts(make(roles={"operators": ["alice"]}), "trainer")))
    assert "alice" not in json.dumps(said)
    assert differing(make(roles={"operators": ["alice"]}), said) == []
    assert differing(make(schedule={"retrain": "0 3 * * sun"}), said) == ["roles", "schedule"]
    assert differing(make(), {}) == [], "a part of an older version says nothing"


def test_parts_on_machines_of_several_sizes_share_their_settings(make: Make) -> None:
    here = make()
    smaller = LimitSettings.model_construct(_fields_set=set(), **{**dict(here.limits), "max_decode_bytes": 1_000_000})
    said = facts(here.model_copy(update={"limits": smaller}), "worker")
    assert differing(here, said) == []
    assert differing(make(limits={"max_decode_bytes": 1_000_000}), said) == ["limits"], "which somebody set"
    assert differing(make(limits={"max_side": 100}), said) == ["limits"]


def test_a_part_of_another_version_is_not_compared(make: Make, sqlite_store: Store) -> None:
    said = facts(make(roles={"operators": ["alice"]}), "trainer")
    for owner, version in (("older", "0"), ("same", __version__)):
        beat_of = partial(workers.beat, owner=owner, version=version, host=owner, pid=1, info=said)
        sqlite_store.run(beat_of)
    (told,) = [check for check in found("workers") if "other settings" in check.message]
    assert "same:1" in told.message


def test_a_schedule_that_a_running_trainer_does_not_know_is_told_by_list_and_doctor(
    make: Make, running: Callable[..., AppState], sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = running(make(), frozenset({TRAIN_QUEUE}))
    wait_until(lambda: parts(sqlite_store), 120, "the trainer's sign of life")
    assert "restart" not in CliRunner().invoke(schedule, ["list"]).stderr
    monkeypatch.setenv("CODE_WORKER_SCHEDULE__REFIT", "0 4 * * *")
    listed = CliRunner().invoke(schedule, ["list"])
    assert "refit: trainer " in listed.stderr
    assert "restart it" in listed.stderr
    refit = [json.loads(row) for row in CliRunner().invoke(schedule, ["list", "--json"]).stdout.splitlines()][1]
    assert len(refit["restart"]) == 1
    (silent, differs) = found("workers")
    assert "none was heard of" in silent.message, "a trainer judges nothing"
    assert "other settings than here: schedule" in differs.message
    assert differs.status is Status.WARN
    trainer.close()
    assert "no trainer was heard of" in CliRunner().invoke(schedule, ["list"]).stderr
    assert parts(sqlite_store) == []


def test_a_beat_says_so_too_and_makes_no_database(make: Make, sqlite_store: Store, tmp_path: Path) -> None:
    gone = tmp_path / "none.db"
    for settings in (make(database_url=f"sqlite:///{gone}"), make()):
        beat_process._start_reporting(settings)
    wait_until(lambda: parts(sqlite_store), 120, "the beat's sign of life")
    assert [part.role for part in parts(sqlite_store)] == ["beat"]
    assert not gone.exists()


def test_a_queue_from_which_nobody_takes_is_a_fault_once_jobs_wait(
    make: Make, running: Callable[..., AppState], sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = install(Celery("theirs", broker=make().resolved_broker_url, set_as_current=False), make())
    app.conf.broker_transport_options = {"global_keyprefix": "cw:"}
    running(make(), frozenset({LIVE, SWEEP_QUEUE}), app)
    wait_until(lambda: parts(sqlite_store), 120, "a sign of life")
    with closing(Client(make())) as client:
        client.enqueue("s3://b/live", priority=9)
        client.enqueue("s3://b/normal")
    (waits,) = [check for check in found("queues") if check.status is not Status.FAIL]
    assert "2 published" in waits.message
    monkeypatch.setattr(fleet, "_UNTAKEN_S", -1.0)
    (untaken,) = found("queues")
    assert untaken.status is Status.FAIL
    assert f"no worker takes from {NORMAL}: 1 wait" in untaken.message
    assert f"-Q {','.join(QUEUES)}" in untaken.hint
    bystander = Bystander(app)
    bystander.look()
    named, _ = found("queues")
    assert f"{socket.gethostname()}:{os.getpid()}: a worker of an app with our tasks" in named.message
    bystander.stop()
    assert len(found("queues")) == 1
    (takes,) = found("workers")
    assert "has no model yet, and loads it now or with the first job" in takes.message


SLOW = """
import time
from pathlib import Path
from code_worker import hookimpl

while not Path({go!r}).exists():
    time.sleep(0.01)

@hookimpl
def code_worker_select_head(job, heads):
    return None
"""


def test_a_worker_that_takes_minutes_to_load_is_heard_of_and_sweeps_meanwhile(
    make: Make, sqlite_store: Store, tmp_path: Path
) -> None:
    go, plugins = tmp_path / "go", tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "slow.py").write_text(SLOW.format(go=str(go)))
    settings = make(plugins_dir=plugins)
    host = AppState(create_app(settings), lambda: settings)
    loading = threading.Thread(target=host.node)
    loading.start()
    try:
        host.start_reporting(QUEUES)
        host.sweep()
        wait_until(lambda: parts(sqlite_store), 120, "its sign of life")
        (told,) = found("workers")
        assert told.status is Status.OK
        assert "loads it now" in told.message
        assert loading.is_alive()
    finally:
        go.touch()
        loading.join(120)
    assert not loading.is_alive()
    wait_until(lambda: [part.role for part in parts(sqlite_store)] == ["worker"], 120, "the sign of life of its node")
    host.close()


def test_an_idle_worker_says_once_that_there_is_no_release(
    make: Make, running: Callable[..., AppState], sqlite_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[int]:
        return [each.levelno for each in caplog.records if "waiting_for_release" in each.getMessage()]

    seen: set[datetime] = set()

    def beats() -> int:
        seen.update(part.seen_at for part in parts(sqlite_store))
        return len(seen)

    running(make(worker={"lease_s": 5}), frozenset(QUEUES))
    wait_until(lambda: beats() > 1 and said(), 120, "signs of life")
    assert said() == [logging.WARNING]


def test_a_producer_with_another_key_prefix_is_told(
    make: Make, running: Callable[..., AppState], sqlite_store: Store
) -> None:
    running(make(), frozenset(QUEUES))
    wait_until(lambda: parts(sqlite_store), 120, "a sign of life")
    assert [check.status for check in found("queues")] == [Status.OK]
    (elsewhere,) = found("queues", broker={"key_prefix": "other:"})
    assert elsewhere.status is Status.FAIL
    assert "CODE_WORKER_BROKER__KEY_PREFIX" in elsewhere.hint


def test_jobs_whose_messages_no_broker_took_are_told(make: Make, sqlite_store: Store) -> None:
    with closing(Client(make(broker_url="redis://127.0.0.1:1/0"))) as client:
        client.enqueue("s3://b/k")
        client.enqueue("s3://b/l")
    assert [check.status for check in found("queues")] == [Status.OK], "the sweeper is given its time"
    ago = "update jobs set due_at = datetime('now', '-37 seconds') || '.000000'"
    with sqlite_store.engine.begin() as connection:
        connection.exec_driver_sql(ago)
    (check,) = found("queues")
    assert check.status is Status.WARN
    assert re.match(r"2 jobs accepted of which no message could be published, the first for \d\d s", check.message)
    with sqlite_store.engine.begin() as connection:
        connection.exec_driver_sql("update jobs set due_at = datetime('now', '+60 seconds') || '.000000'")
    assert [check.status for check in found("queues")] == [Status.OK], "they wait for another attempt"


def test_messages_that_no_worker_saw_are_told_wherever_doctor_runs(
    make: Make, running: Callable[..., AppState], sqlite_store: Store
) -> None:
    host = running(make(), frozenset(QUEUES))
    with closing(Client(make(broker={"key_prefix": "other:"}))) as client:
        job = client.enqueue("s3://b/k")
    ago = "update jobs set published_at = datetime('now', '-60 seconds') || '.000000'"
    with sqlite_store.engine.begin() as connection:
        connection.exec_driver_sql(ago)
    assert host.sweep().published == 1
    assert Publisher(create_app(make())).depth(NORMAL) == 1
    wait_until(lambda: any(part.info["unheard"] for part in parts(sqlite_store)), 120, "what the sweeper saw")
    (unseen,) = found("queues")
    assert unseen.status is Status.WARN
    assert "messages of 1 job were neither in their queue nor held by a worker" in unseen.message
    assert sqlite_store.run(lambda session: jobs.get(session, job), write=False) is not None


def test_messages_that_a_worker_took_and_has_not_judged_yet_are_not_lost(
    make: Make, running: Callable[..., AppState], sqlite_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a worker that loads its model for longer than the sweeper waits."""
    host = running(make(), frozenset(QUEUES))
    with closing(Client(make())) as client:
        client.enqueue("s3://b/k")
    with create_app(make()).connection_for_read() as connection:
        assert bound_queue(NORMAL)(connection.default_channel).get() is not None
        with sqlite_store.engine.begin() as there:
            there.exec_driver_sql("update jobs set published_at = datetime('now', '-60 seconds') || '.000000'")
        assert host.sweep().published == 1, "its worker may have died"
    assert "messages_lost" not in caplog.text
    assert [check.status for check in found("queues")] == [Status.OK]


def test_a_champion_whose_head_no_plugin_offers_is_a_fault_here_and_on_each_worker(
    make: Make, sqlite_store: Store, toy_release_dir: Path
) -> None:
    plugins = load_plugins(make())
    registry = open_registry(make(), store=sqlite_store, plugins=plugins)
    release = registry.add(toy_release_dir)
    registry.promote(release, by="test")

    def say(heads: list[str]) -> None:
        said = {**facts(make(), "worker"), "heads": heads, "queues": list(QUEUES)}
        sqlite_store.run(
            lambda session: workers.beat(session, "a", version="0", release=release, host="first", pid=1, info=said)
        )

    say(sorted(plugins.heads()))
    assert {check.status for check in (*found("release"), *found("workers"))} == {Status.OK}
    say(["linear"])
    lacking = [check for check in found("workers") if check.status is Status.FAIL]
    assert {"first:1 has no plugin for the head 'knn'", "first:1 has no plugin for the head 'svm'"} == {
        check.message.partition(" of champion")[0] for check in lacking
    }
    here = [check for check in found("release", plugins_allowed=["nobody"]) if check.status is Status.FAIL]
    assert here, "a plugin that is not allowed is none"


def test_a_part_that_fails_is_a_fault(make: Make, running: Callable[..., AppState], sqlite_store: Store) -> None:
    def fail() -> None:
        raise LookupError("secret")

    broken = Repeater("retention", 3600, fail)
    broken.start()
    running(make(), frozenset({TRAIN_QUEUE}))
    wait_until(lambda: any(part.info["failing"] for part in parts(sqlite_store)), 120, "its sign of life")
    broken.stop()
    (failing,) = [check for check in found("workers") if check.status is Status.FAIL]
    assert "'retention' failed 1 times in a row" in failing.message
    assert "secret" not in failing.message
