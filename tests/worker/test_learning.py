"""Learning in a deployment: real broker, real trainer processes, and what they do when they are killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from celery import Celery

from code_worker.broker import celery_config
from code_worker.plugins import load_plugins
from code_worker.queues import REFIT, RETRAIN, TRAIN_QUEUE
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.store import migrate, releases, runs, schedule
from code_worker.store.engine import Store, open_store
from tests.servers import RedisServer
from tests.training.learning import build_champion, label_world, promote_champion
from tests.worker.harness import WorkerProcess, wait_until

ENDED = {"promoted", "rejected", "failed", "skipped"}


class Deployment:
    """A database, a broker and trainers, with a labelled store and a champion."""

    def __init__(self, directory: Path, broker: str, champion: Path) -> None:
        self.directory = directory
        self.environment = {
            "CODE_WORKER_DATA_DIR": str(directory / "data"),
            "CODE_WORKER_BROKER_URL": broker,
            "CODE_WORKER_DEVICE": "cpu",
            "CODE_WORKER_LOG_FORMAT": "json",
            "CODE_WORKER_SCHEDULE__MIN_HOLDOUT": "8",
            "CODE_WORKER_TRAINING__EPOCHS": "2",
            "CODE_WORKER_TRAINING__STEPS_PER_EPOCH": "3",
            "CODE_WORKER_TRAINING__RECORDS": "8",
            "CODE_WORKER_TRAINING__LOADER_PROCESSES": "0",
            "CODE_WORKER_TRAINING__LEASE_S": "2",
            "OMP_NUM_THREADS": "1",
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


@pytest.fixture(scope="module")
def champion_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_champion(tmp_path_factory.mktemp("champion") / "release")


@pytest.fixture
def deployment(tmp_path: Path, redis_server: RedisServer, champion_dir: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path, redis_server.url, champion_dir)
    yield made
    made.close()


def modules_of(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/maps").read_text()


def test_a_task_becomes_a_run_and_an_idle_trainer_has_loaded_no_model_code(deployment: Deployment) -> None:
    label_world(deployment.settings, deployment.store)
    trainer = deployment.trainer()
    wait_until(lambda: "trainer_starting" in deployment.log(), 60, "the trainer")
    (child,) = trainer.children()
    assert "libtorch" not in modules_of(child)
    deployment.send(REFIT, by="alice")
    (run,) = deployment.ended()
    assert (run.kind, run.state, run.by) == ("refit", "promoted", "alice")
    assert "libtorch" in modules_of(child)
    assert trainer.terminate() == 0


def test_two_schedulers_fire_one_time_once(deployment: Deployment) -> None:
    label_world(deployment.settings, deployment.store)
    now = datetime.now(UTC)
    deployment.environment["CODE_WORKER_SCHEDULE__REFIT"] = f"{now.minute} {now.hour} * * *"
    for _ in range(2):
        deployment.trainer()
        deployment.send(REFIT, scheduled=True)
    deployment.ended()
    time.sleep(2)
    assert [run.kind for run in deployment.ended()] == ["refit"]
    (slot,) = deployment.store.run(schedule.list_slots, write=False)
    assert slot.run_id == deployment.runs()[0].id
    assert slot.slot == now.replace(second=0, microsecond=0)


def test_a_trainer_that_is_told_to_stop_leaves_its_run_to_the_next(deployment: Deployment) -> None:
    label_world(deployment.settings, deployment.store)
    deployment.environment["CODE_WORKER_TRAINING__EPOCHS"] = "50"
    deployment.environment["CODE_WORKER_TRAINING__STEPS_PER_EPOCH"] = "200"
    first = deployment.trainer()
    deployment.send(RETRAIN)
    wait_until(lambda: list(deployment.directory.glob("data/runs/*/job/progress.json")), 90, "training")
    wait_until(
        lambda: '"training"' in next(deployment.directory.glob("data/runs/*/job/progress.json")).read_text(),
        90,
        "a step",
    )
    assert first.terminate(100) == 0
    (run,) = deployment.runs()
    assert (run.state, run.stage, run.attempts) == ("running", "train", 0)
    assert list(deployment.directory.glob("data/runs/*/job/checkpoints/*")), "a checkpoint was written"
    (job,) = deployment.directory.glob("data/runs/*/job/job.json")
    # The rest of it in a moment: what matters is that it goes on.
    job.write_text(
        job.read_text()
        .replace('"epochs": 50', '"epochs": 1')
        .replace('"steps_per_epoch": 200', '"steps_per_epoch": 1')
    )
    deployment.trainer()
    (run,) = deployment.ended()
    assert run.state in {"promoted", "rejected"}, run.reasons
    assert run.attempts == 1


@pytest.mark.parametrize(("kind", "seed"), [("refit", 1), ("retrain", 3)])
def test_a_killed_trainer_is_followed_by_one_that_finishes_its_run(
    deployment: Deployment, kind: str, seed: int
) -> None:
    label_world(deployment.settings, deployment.store)
    trainer = deployment.trainer()
    deployment.send({"refit": REFIT, "retrain": RETRAIN}[kind], force=True)
    wait_until(deployment.runs, 60, "a run")
    # At any moment; bench/crash.py tries twenty of them.
    time.sleep(random.Random(seed).uniform(0, 3 if kind == "refit" else 12))
    kill_all(trainer)
    deployment.check_champion()
    follower = deployment.trainer()
    (run,) = deployment.ended()
    assert run.state in {"promoted", "rejected"}, run.reasons
    deployment.check_champion()
    assert follower.terminate() == 0


def kill_all(process: WorkerProcess) -> None:
    """SIGKILL to a supervisor and to everything below it, as when a machine goes down."""
    everybody = [psutil.Process(process.pid), *process.children()]
    for each in everybody:
        each.suspend()
    for each in everybody:
        each.send_signal(signal.SIGKILL)
    process.process.wait(10)
    psutil.wait_procs(everybody[1:], timeout=10)


def test_a_killed_training_process_goes_on_without_a_new_attempt(deployment: Deployment) -> None:
    label_world(deployment.settings, deployment.store)
    trainer = deployment.trainer()
    deployment.send(RETRAIN)

    def training() -> psutil.Process | None:
        return next((each for each in trainer.children() if "code_worker.training.process" in each.cmdline()), None)

    child: psutil.Process = wait_until(training, 90, "the training process")
    child.kill()
    (run,) = deployment.ended()
    assert run.state in {"promoted", "rejected"}, run.reasons
    assert run.attempts == 1
    assert "training_process_died" in deployment.log()
