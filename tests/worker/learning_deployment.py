"""A deployment that learns: a labelled store, a champion, a broker, and trainers that can be killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from celery import Celery

from code_worker.broker import celery_config
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.store import migrate, releases
from code_worker.store.engine import Store, open_store
from code_worker.store.learning import runs
from code_worker.wire import TRAIN_QUEUE
from tests.fork_server import CHILDREN_ENV
from tests.training.learning import promote_champion
from tests.worker.harness import WorkerProcess, wait_until

ENDED = {"promoted", "rejected", "failed", "skipped"}


class LearningDeployment:
    """A database, a broker and trainers, with a labelled store and a champion."""

    def __init__(self, directory: Path, broker: str, champion: Path) -> None:
        self.directory = directory
        self.environment = {
            "CODE_WORKER_DATA_DIR": str(directory / "data"),
            "CODE_WORKER_BROKER_URL": broker,
            "CODE_WORKER_DEVICE": "cpu",
            "CODE_WORKER_LOG_FORMAT": "json",
            "CODE_WORKER_SCHEDULE__MIN_HOLDOUT": "8",
            "CODE_WORKER_GATE__MAX_REGRESSION": "0.3",
            "CODE_WORKER_GATE__ERROR": "0.2",
            "CODE_WORKER_TRAINING__EPOCHS": "2",
            "CODE_WORKER_TRAINING__STEPS_PER_EPOCH": "3",
            "CODE_WORKER_TRAINING__RECORDS": "8",
            "CODE_WORKER_TRAINING__LOADER_PROCESSES": "0",
            "CODE_WORKER_TRAINING__LEASE_S": "2",
            "OMP_NUM_THREADS": "1",
            CHILDREN_ENV: "1",
        }
        self.processes: list[WorkerProcess] = []
        self.store = self._open_store()
        self.champion = promote_champion(self.settings, self.store, champion)

    @property
    def settings(self) -> Settings:
        saved = dict(os.environ)
        os.environ.update(self.environment)
        try:
            return load_settings()
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def _open_store(self) -> Store:
        store = open_store(self.settings.resolved_database_url)
        migrate.upgrade(store)
        return store

    def start(self, *arguments: str) -> WorkerProcess:
        command = [sys.executable, "-m", "code_worker", *arguments]
        process = WorkerProcess(command, {**os.environ, **self.environment}, self.directory / "log")
        self.processes.append(process)
        return process

    def trainer(self) -> WorkerProcess:
        return self.start("trainer")

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def send(self, task: str, **arguments: object) -> None:
        with Celery("producer", set_as_current=False) as app:
            app.config_from_object(celery_config(self.settings))
            app.send_task(task, kwargs=arguments, queue=TRAIN_QUEUE)

    def runs(self) -> list[runs.Run]:
        return self.store.run(runs.list_runs, write=False)

    def ended(self, count: int = 1) -> list[runs.Run]:
        """So many runs, all of which have ended."""

        def there() -> list[runs.Run] | None:
            found = self.runs()
            return found if len(found) >= count and all(run.state in ENDED for run in found) else None

        found: list[runs.Run] = wait_until(there, 180, f"{count} runs to end\n{self.log()[-3000:]}")
        return found

    def check_champion(self) -> None:
        """The alias points to a release whose every file is right, as it must at any moment."""
        registry = open_registry(self.settings, store=self.store, plugins=load_plugins(self.settings))
        registry.load_to_judge(str(self.store.run(lambda session: releases.alias(session, "champion"), write=False)))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.store.close()
