"""Learning in a deployment: real broker, real trainer processes, and what they do when they are killed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from code_worker.wire import REFIT, RETRAIN
from tests.faults.rows import Seen, row
from tests.fork_server import CHILDREN_ENV
from tests.servers import RedisServer
from tests.store.acts import slots
from tests.training.learning import build_champion, label_world
from tests.worker.harness import WorkerProcess, wait_until
from tests.worker.learning_deployment import LearningDeployment


@pytest.fixture(scope="module")
def champion_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_champion(tmp_path_factory.mktemp("champion") / "release")


@pytest.fixture
def deployment(tmp_path: Path, redis_server: RedisServer, champion_dir: Path) -> Iterator[LearningDeployment]:
    made = LearningDeployment(tmp_path, redis_server.url, champion_dir)
    yield made
    made.close()


def modules_of(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/maps").read_text()


def test_a_task_becomes_a_run_and_an_idle_trainer_has_loaded_no_model_code(deployment: LearningDeployment) -> None:
    del deployment.environment[CHILDREN_ENV]  # looks at the training process itself
    label_world(deployment.settings, deployment.store)
    trainer = deployment.trainer()
    wait_until(lambda: "trainer_starting" in deployment.log(), 120, "the trainer")
    (child,) = trainer.children()
    assert "libtorch" not in modules_of(child)
    deployment.send(REFIT, by="alice")
    (run,) = deployment.ended()
    assert (run.kind, run.state, run.by) == ("refit", "promoted", "alice")
    assert "libtorch" in modules_of(child)
    assert trainer.terminate() == 0


@row(
    "F31",
    injection="two schedulers send the same time, two trainers take it",
    expected="one run, the slot taken once",
)
def test_two_schedulers_fire_one_time_once(deployment: LearningDeployment, seen: Seen) -> None:
    label_world(deployment.settings, deployment.store)
    now = datetime.now(UTC)
    deployment.environment["CODE_WORKER_SCHEDULE__REFIT"] = f"{now.minute} {now.hour} * * *"
    for _ in range(2):
        deployment.trainer()
        deployment.send(REFIT, scheduled=True)
    deployment.ended()
    time.sleep(2)
    assert [run.kind for run in deployment.ended()] == ["refit"]
    (slot,) = slots(deployment.store)
    assert slot.run_id == deployment.runs()[0].id
    assert slot.slot == now.replace(second=0, microsecond=0)
    seen(sent=2, runs=1, slots=1)


@pytest.mark.slow(reason="two trainers, and training processes from nothing")
def test_a_trainer_that_is_told_to_stop_leaves_its_run_to_the_next(deployment: LearningDeployment) -> None:
    label_world(deployment.settings, deployment.store)
    deployment.environment["CODE_WORKER_TRAINING__EPOCHS"] = "50"
    deployment.environment["CODE_WORKER_TRAINING__STEPS_PER_EPOCH"] = "200"
    first = deployment.trainer()
    deployment.send(RETRAIN)
    wait_until(lambda: list(deployment.directory.glob("data/runs/*/job/progress.json")), 120, "training")
    wait_until(
        lambda: '"training"' in next(deployment.directory.glob("data/runs/*/job/progress.json")).read_text(),
        120,
        "a step",
    )
    assert first.terminate(240) == 0
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


@pytest.mark.slow(reason="two trainers, and training processes from nothing")
@pytest.mark.parametrize(("kind", "seed"), [("refit", 1), ("retrain", 3)])
def test_a_killed_trainer_is_followed_by_one_that_finishes_its_run(
    deployment: LearningDeployment, kind: str, seed: int
) -> None:
    label_world(deployment.settings, deployment.store)
    trainer = deployment.trainer()
    deployment.send({"refit": REFIT, "retrain": RETRAIN}[kind], force=True)
    wait_until(deployment.runs, 120, "a run")
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
    process.process.wait(120)
    psutil.wait_procs(everybody[1:], timeout=120)


@pytest.mark.slow(reason="two training processes from nothing")
def test_a_killed_training_process_goes_on_without_a_new_attempt(deployment: LearningDeployment) -> None:
    del deployment.environment[CHILDREN_ENV]  # looks at the training process itself
    label_world(deployment.settings, deployment.store)
    trainer = deployment.trainer()
    deployment.send(RETRAIN)

    def training() -> psutil.Process | None:
        return next(
            (
                each
                for each in trainer.children()
                if "code_worker.training.fitting.training_process" in each.cmdline()
            ),
            None,
        )

    child: psutil.Process = wait_until(training, 120, "the training process")
    child.kill()
    (run,) = deployment.ended()
    assert run.state in {"promoted", "rejected"}, run.reasons
    assert run.attempts == 1
    assert "training_process_died" in deployment.log()
