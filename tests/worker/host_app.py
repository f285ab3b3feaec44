"""Somebody's app in one of six layouts (`HOST_LAYOUT`), with ours installed at a step (`HOST_INSTALL`) or without."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from celery import Celery, shared_task
from kombu import Queue

BROKER = os.environ["HOST_BROKER"]
RECORD = Path(os.environ["HOST_RECORD"])
INSTALL = os.environ.get("HOST_INSTALL", "")
ENTRIES = {"theirs.ticking": {"task": "theirs.tick", "schedule": 0.5, "args": ("entry",)}}
BASE = {
    "broker_url": BROKER,
    "result_backend": BROKER,
    "broker_connection_retry_on_startup": True,
    "worker_send_task_events": True,
    "task_send_sent_event": True,
    "task_time_limit": float(os.environ.get("HOST_LIMIT_S", "60")),
    "task_soft_time_limit": float(os.environ.get("HOST_LIMIT_S", "60")),
}


def note(task: Any) -> None:
    """One line per message that a worker took, with how it came."""
    sent = task.request.delivery_info
    line = {"task": task.name, "exchange": sent["exchange"], "key": sent["routing_key"], "args": task.request.args}
    with RECORD.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


@shared_task(bind=True, name="theirs.add")
def add(self: Any, a: int, b: int) -> int:
    note(self)
    return a + b


@shared_task(bind=True, name="theirs.feed", ignore_result=True)
def feed(self: Any) -> None:
    note(self)


@shared_task(bind=True, name="theirs.tick", ignore_result=True)
def tick(self: Any, whose: str) -> None:
    RECORD.with_suffix(f".{whose}").touch()


@shared_task(bind=True, name="theirs.last")
def last(self: Any) -> str:
    note(self)
    return "done"


@shared_task(bind=True, name="theirs.kick")
def kick(self: Any, uri: str) -> str | None:
    """Sends as their code does: by a route, by an exchange, and a job to us."""
    note(self)
    add.delay(2, 3)
    feed.apply_async(**({"exchange": "tasks", "routing_key": "feed.import"} if LAYOUT == "topic" else {}))
    if not INSTALL:
        return None
    import code_worker

    return code_worker.enqueue(uri)


def plain(app: Celery) -> None:
    app.conf.update(BASE, beat_schedule=ENTRIES)


def django(app: Celery) -> None:
    settings = {f"CELERY_{name.upper()}": value for name, value in {**BASE, "beat_schedule": ENTRIES}.items()}
    app.config_from_object(SimpleNamespace(**settings, DEBUG=True), namespace="CELERY")


def discovering(app: Celery) -> None:
    plain(app)
    app.autodiscover_tasks(["tests.worker"], related_name="discovered")


def topic(app: Celery) -> None:
    """As in Celery's routing guide."""
    plain(app)
    app.conf.task_queues = (Queue("default", routing_key="task.#"), Queue("feed_tasks", routing_key="feed.#"))
    app.conf.task_default_queue = "default"
    app.conf.task_default_exchange, app.conf.task_default_exchange_type = "tasks", "topic"
    app.conf.task_default_routing_key = "task.default"
    app.conf.task_create_missing_queues = False


def prefixed(app: Celery) -> None:
    plain(app)
    app.conf.broker_transport_options = {"global_keyprefix": "theirs:"}


def redbeat(app: Celery) -> None:
    plain(app)
    app.conf.beat_scheduler = "redbeat.RedBeatScheduler"
    app.conf.redbeat_redis_url = BROKER
    app.conf.redbeat_redis_options = {"socket_timeout": 10}


LAYOUTS: dict[str, Callable[[Celery], None]] = {
    "plain": plain,
    "django": django,
    "autodiscover": discovering,
    "topic": topic,
    "global_keyprefix": prefixed,
    "redbeat": redbeat,
}
LAYOUT = os.environ["HOST_LAYOUT"]


def install(when: str) -> None:
    if when == INSTALL:
        import code_worker

        code_worker.install(app)


app = Celery("theirs")
install("first")


@app.on_after_configure.connect
def periodic(sender: Celery, **_: Any) -> None:
    sender.add_periodic_task(0.5, tick.s("handler"), name="theirs.handler")


LAYOUTS[LAYOUT](app)
install("last")
