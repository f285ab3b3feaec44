"""Somebody's Celery app, with tasks, queues, routes and beat entries of its own, into which ours are installed."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery
from kombu import Queue

import code_worker

app = Celery("theirs", broker=os.environ["CODE_WORKER_BROKER_URL"])
app.conf.task_queues = [Queue("theirs.mail"), Queue("theirs.images")]
app.conf.task_default_queue = "theirs.mail"
app.conf.task_routes = {"theirs.resize": {"queue": "theirs.images"}}
app.conf.beat_schedule = {"theirs.nightly": {"task": "theirs.resize", "schedule": 3600.0, "args": ("nightly",)}}
app.conf.worker_cancel_long_running_tasks_on_connection_loss = False
app.conf.broker_transport_options = {"visibility_timeout": 600}


@app.task(name="theirs.resize", ignore_result=True)
def resize(name: str) -> None:
    (Path(os.environ["THEIRS_DIRECTORY"]) / name).touch()


code_worker.install(app)
