"""Somebody's Celery app, into which ours is installed: with tasks, queues, routes and beat entries of its own.

It has set all that can be set for a whole process, as an application may for tasks of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery
from kombu import Queue

import code_worker
from tests.process_switches import set_all

set_all()
app = Celery("theirs", broker=os.environ.get("THEIRS_BROKER") or os.environ["CODE_WORKER_BROKER_URL"])
app.conf.task_queues = [Queue("theirs.mail"), Queue("theirs.images")]
app.conf.task_default_queue = "theirs.mail"
app.conf.task_routes = {"theirs.resize": {"queue": "theirs.images"}}
app.conf.beat_schedule = {"theirs.nightly": {"task": "theirs.resize", "schedule": 3600.0, "args": ("nightly",)}}
app.conf.worker_cancel_long_running_tasks_on_connection_loss = False
app.conf.broker_transport_options = {"visibility_timeout": 600, "master_name": "theirs"}


@app.task(name="theirs.resize", ignore_result=True)
def resize(name: str) -> None:
    (Path(os.environ["THEIRS_DIRECTORY"]) / name).touch()


code_worker.install(app)
