"""Real workers and beat of somebody's app, with and without us: theirs is recorded and compared, ours works too."""

from __future__ import annotations

import os
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.result import allow_join_result
from kombu import Connection, Exchange, Queue

from code_worker.store import migrate
from code_worker.store.engine import open_store
from code_worker.types import Outcome
from code_worker.wire import MODERATE, NORMAL, QUEUES, SWEEP_QUEUE, TRAIN_QUEUE
from tests.patience import LIMIT_S
from tests.servers import RedisServer
from tests.worker.harness import Deployment, WorkerProcess, environment_in, jpeg, promote_release, wait_until

OURS = ",".join([*QUEUES, SWEEP_QUEUE])
TIME_LIMIT_S = 1
THEIR_TASKS = ("theirs.kick", "theirs.add", "theirs.feed", "theirs.last")
EVENTS = {
    ("task-sent", "theirs.add"),
    ("task-sent", "theirs.feed"),
    *((f"task-{kind}", task) for task in THEIR_TASKS for kind in ("received", "started", "succeeded")),
}
LAYOUTS = {
    # Pool, and when we are installed.
    "plain": ("prefork", "first"),
    "django": ("threads", "last"),
    "autodiscover": ("threads", "first"),
    "topic": ("prefork", "first"),
    "global_keyprefix": ("threads", "last"),
    "redbeat": ("threads", "first"),
}


@pytest.fixture(scope="module")
def broker() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def deployment(
    broker: RedisServer, tmp_path_factory: pytest.TempPathFactory, toy_release_dir: Path
) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("layouts")
    url = f"sqlite:///{directory / 'db.sqlite'}"
    environment = environment_in(directory, url, broker.url) | {
        "CODE_WORKER_ENGINE": "torch",
        "CODE_WORKER_BROKER__KEY_PREFIX": "null",
    }
    made = Deployment(environment, directory / "workers.log")
    with closing(open_store(url)) as store:
        migrate.upgrade(store)
    promote_release(made, toy_release_dir)
    yield made
    made.close()


@dataclass
class Seen:
    """What monitors saw of an app's worker."""

    last: str = ""
    queues: list[tuple[str, str, str]] = field(default_factory=list)
    registered: list[str] = field(default_factory=list)
    events: set[tuple[str, str]] = field(default_factory=set)


class Host:
    """A worker of theirs with beat in it, and the sender and monitor that go with it."""

    def __init__(
        self, deployment: Deployment, layout: str, pool: str, install: str, url: str, directory: Path
    ) -> None:
        self.deployment, self.layout, self.url, self.directory = deployment, layout, url, directory
        self.name = install or "alone"
        self.record = directory / f"{self.name}.jsonl"
        self.environment = {
            **os.environ,
            **deployment.environment,
            "HOST_LAYOUT": layout,
            "HOST_BROKER": url,
            "HOST_RECORD": str(self.record),
            "HOST_INSTALL": install,
        }
        self.pool = pool
        prefix = {"global_keyprefix": "theirs:"} if layout == "global_keyprefix" else {}
        self.app = Celery("monitor", broker=url, backend=url, set_as_current=False)
        self.app.conf.broker_transport_options = prefix
        self.worker = self.start("theirs", "-B", "-s", str(directory / f"{self.name}-schedule"))

    def start(self, node: str, *options: str, **more: str) -> WorkerProcess:
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "tests.worker.host_app",
            "worker",
            "-P",
            self.pool,
            "-c",
            "1",
        ]
        log = self.directory / f"{self.name}-{node}.log"
        worker = WorkerProcess(
            [*command, "-n", f"{node}@%h", "-l", "INFO", "--without-mingle", *options],
            {**self.environment, **more},
            log,
        )
        self.deployment.workers.append(worker)
        return worker

    def send(self, task: str, *args: str) -> Any:
        return self.app.send_task(task, args=args, queue="default" if self.layout == "topic" else "celery")

    def log(self, node: str = "theirs") -> str:
        return (self.directory / f"{self.name}-{node}.log").read_text()

    def ready(self, node: str = "theirs") -> None:
        wait_until(lambda: f"{node}@{socket.gethostname()} ready" in self.log(node), LIMIT_S, self.log(node))

    def observed(self, uri: str) -> tuple[Seen, str | None]:
        """Each of their tasks and entries once, and what monitors see; the job that was sent."""
        seen = Seen()
        with self.watching(seen), allow_join_result():
            job = self.send("theirs.kick", uri).get(timeout=LIMIT_S)
            seen.last = self.send("theirs.last").get(timeout=LIMIT_S)
        for kind in ("entry", "handler"):
            wait_until(self.record.with_suffix(f".{kind}").exists, LIMIT_S, f"their {kind}: {self.log()[-3000:]}")
        control = self.app.control.inspect(destination=[f"theirs@{socket.gethostname()}"], limit=1, timeout=LIMIT_S)
        (queues,) = control.active_queues().values()
        (registered,) = control.registered().values()
        seen.queues = sorted((queue["name"], queue["exchange"]["name"], queue["routing_key"]) for queue in queues)
        seen.registered = sorted(task for task in registered if not task.startswith("code_worker."))
        return seen, job

    @contextmanager
    def watching(self, seen: Seen) -> Iterator[None]:
        """Collects the events of their tasks until all have come that Celery sends of them."""
        listening = threading.Event()
        names: dict[str, str] = {}
        heard: set[tuple[str, str]] = set()

        def hear(event: dict[str, Any]) -> None:
            listening.set()
            if event["type"].startswith("task-"):
                # Only some say the name, and those of the pool may come before those of the consumer.
                heard.add((event["type"], event["uuid"]))
                names.update({event["uuid"]: event["name"]} if event.get("name") else {})
                named = {(kind, names.get(task, "")) for kind, task in heard}
                seen.events = {(kind, name) for kind, name in named if name in THEIR_TASKS}

        def capture() -> None:
            with self.app.connection_for_read() as connection:
                receiver = self.app.events.Receiver(connection, handlers={"*": hear})
                # The workers are asked to say that they live, by which it is known that this listens.
                for _ in receiver.itercapture(timeout=LIMIT_S, wakeup=True):
                    if seen.events >= EVENTS:
                        return

        thread = threading.Thread(target=capture, daemon=True)
        thread.start()
        assert listening.wait(LIMIT_S)
        yield
        thread.join(LIMIT_S)
        assert not thread.is_alive(), EVENTS - seen.events

    def lines(self) -> Counter[str]:
        """What the workers took so far."""
        return Counter(self.record.read_text().splitlines())


def leave_bindings(url: str) -> None:
    """Binds our queues to their exchange, as an earlier version did."""
    with Connection(url) as connection:
        for name in (*QUEUES, SWEEP_QUEUE, TRAIN_QUEUE):
            Queue(name, Exchange("tasks", type="topic"), "task.#")(connection.default_channel).declare()


def message_that_lasts(host: Host, deployment: Deployment, uri: str) -> None:
    """Has our worker wait for the database for longer than the app lets its own tasks run."""
    database = deployment.environment["CODE_WORKER_DATABASE_URL"].removeprefix("sqlite:///")
    with closing(sqlite3.connect(database, isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        message = {"v": 1, "items": [{"uri": uri, "key": host.layout}]}
        sent = host.app.send_task(MODERATE, args=[message], queue=NORMAL, ignore_result=True)
        wait_until(lambda: f"{MODERATE}[{sent.id}] received" in host.log("ours"), LIMIT_S, "the message")
        time.sleep(2.5 * TIME_LIMIT_S)
        held.execute("ROLLBACK")
    wait_until(lambda: f"{MODERATE}[{sent.id}] succeeded" in host.log("ours"), LIMIT_S, host.log("ours")[-3000:])


@pytest.mark.slow(reason="the first layout waits until a process has imported everything for all of them")
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_their_app_works_as_without_us_and_ours_does_too(
    layout: str, deployment: Deployment, broker: RedisServer, tmp_path: Path
) -> None:
    pool, install = LAYOUTS[layout]
    urls = [f"redis://127.0.0.1:{broker.port}/{2 * list(LAYOUTS).index(layout) + each}" for each in range(2)]
    if layout == "topic":
        leave_bindings(urls[1])
    alone = Host(deployment, layout, pool, "", urls[0], tmp_path)
    host = Host(deployment, layout, pool, install, urls[1], tmp_path)
    ours = host.start("ours", "-Q", OURS, HOST_LIMIT_S=str(TIME_LIMIT_S))
    for each, node in ((alone, "theirs"), (host, "theirs"), (host, "ours")):
        each.ready(node)
    image = deployment.log_path.parent / "files" / f"{layout}.jpg"
    image.write_bytes(jpeg(list(LAYOUTS).index(layout)))
    expected, _ = alone.observed(str(image))
    seen, job = host.observed(str(image))
    assert seen == expected
    client = deployment.client()
    verdict = wait_until(lambda: client.verdict(job or ""), LIMIT_S, f"our verdict: {host.log('ours')[-3000:]}")
    assert verdict.outcome is Outcome.JUDGED
    wait_until(lambda: host.lines() >= alone.lines(), LIMIT_S, f"{alone.lines()} and not {host.lines()}")
    assert host.lines() == alone.lines()
    assert "theirs." not in host.log("ours").partition("ready.")[2], "nothing of theirs reaches ours"
    if pool == "prefork":
        # Measured after the task, so after its verdict.
        wait_until(lambda: "prefork_child_memory" in host.log("ours"), LIMIT_S, "a child that measured itself")
        message_that_lasts(host, deployment, str(image))
    for worker in deployment.workers[-3:]:
        assert worker.terminate() == 0
    assert ours.process.returncode == 0
