"""Schedulers of every kind, killed and doubled: each time of a schedule becomes one run."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.faults.rows import Bar, Seen, row
from tests.servers import RedisServer
from tests.store.acts import slots
from tests.training.learning import build_champion, label_world
from tests.worker.harness import WorkerProcess, wait_until
from tests.worker.learning_deployment import LearningDeployment


@pytest.fixture
def deployment(tmp_path: Path, redis_server: RedisServer) -> Iterator[LearningDeployment]:
    made = LearningDeployment(tmp_path, redis_server.url, build_champion(tmp_path / "champion"))
    made.environment |= {
        "CODE_WORKER_SCHEDULE__REFIT": "* * * * *",
        "CODE_WORKER_BROKER__KEY_PREFIX": "null",
        "THEIRS_DIRECTORY": str(tmp_path),
    }
    yield made
    made.close()


def _plain_beat(deployment: LearningDeployment, number: int) -> WorkerProcess:
    """Celery's own scheduler, which knows no lock."""
    command = [sys.executable, "-m", "celery", "-A", "tests.worker.foreign_app", "beat"]
    command += ["-s", str(deployment.directory / f"beat-{number}")]
    beat = WorkerProcess(command, {**os.environ, **deployment.environment}, deployment.directory / "log")
    deployment.processes.append(beat)
    return beat


def _slots(deployment: LearningDeployment) -> list[datetime]:
    return [slot.slot for slot in slots(deployment.store) if slot.run_id]


def _wait_for_second(second: int) -> None:
    now = datetime.now(UTC)
    time.sleep((second - now.second - now.microsecond / 1e6) % 60)


@pytest.mark.nightly
@row(
    "F31",
    injection="2 plain and 2 locked beats; all killed and Redis restarted over the turn of a minute",
    expected="one run per time; the missed one caught up once, ≤ 60 s after Redis is back",
)
def test_each_time_of_a_schedule_becomes_one_run(
    deployment: LearningDeployment, redis_server: RedisServer, seen: Seen, bar: Bar
) -> None:
    label_world(deployment.settings, deployment.store)
    deployment.trainer()
    beats = [_plain_beat(deployment, number) for number in range(2)]
    beats += [deployment.start("beat") for _ in range(2)]
    wait_until(lambda: len(_slots(deployment)) >= 2, 180, "two times to be taken")
    _wait_for_second(55)
    for beat in beats:
        beat.kill()
    redis_server.kill()
    missed = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
    _wait_for_second(5)
    redis_server.start()
    began = time.monotonic()
    wait_until(lambda: missed in _slots(deployment), bar(60), "the missed time to be caught up")
    caught_up_s = time.monotonic() - began
    time.sleep(2)
    runs = Counter(run.by for run in deployment.ended())
    slots = _slots(deployment)
    assert max(runs.values()) == 1, runs
    assert len(slots) == len(set(slots)) == len(runs)
    seen(times=len(slots), runs=len(runs), caught_up_s=caught_up_s)
