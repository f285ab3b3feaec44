"""A batch that hangs, or a device that is lost, ends the process, whatever became of its stderr."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from celery.utils.log import LoggingProxy

from code_worker.store.jobs import queries
from code_worker.wire import LIVE, NORMAL, SWEEP_QUEUE
from code_worker.worker.judging.watchdog import STUCK_STATUS, InFlight, Watchdog
from tests.worker.harness import Deployment, WorkerProcess, jpeg, wait_until

STUCK = """
import sys, threading, time
from celery.utils.log import LoggingProxy
from code_worker.logs import get_logger
from code_worker.worker.judging.watchdog import InFlight
from code_worker.worker.judging.watchdog import Watchdog
{before}
in_flight = InFlight()
with in_flight.batch(["job"]):
    dog = Watchdog(in_flight, lambda: None, 0.01)
    {then}
"""
HANGING = """
import threading
from code_worker import hookimpl

@hookimpl
def code_worker_select_head(job, heads):
    if job.metadata.get("hang"):
        threading.Event().wait()
"""


def ended(before: str, then: str = "time.sleep(0.1); dog.look()", *, closed: bool = False) -> tuple[int, str]:
    """Exit status and stderr of a process whose batch is silent."""
    program = STUCK.format(before=before, then=then)
    close: Callable[[], None] = lambda: os.close(2) if closed else None  # noqa: E731 - in the child, before Python starts
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, preexec_fn=close, timeout=120
    )
    return done.returncode, done.stderr


def test_all_stacks_are_written_where_celery_has_put_a_logger_in_place_of_stderr() -> None:
    status, said = ended("import logging; sys.stderr = LoggingProxy(logging.getLogger('celery.redirected'))")
    assert status == STUCK_STATUS
    assert "Current thread" in said
    assert "watchdog.py" in said


@pytest.mark.parametrize("before", ["", "sys.stderr = None", "sys.stderr.close()"])
def test_a_process_without_a_stderr_is_ended_all_the_same(before: str) -> None:
    assert ended(before, closed=not before)[0] == STUCK_STATUS


def test_a_log_that_raises_keeps_nobody_from_ending_the_process() -> None:
    before = "from code_worker.worker.judging import watchdog; watchdog.log = None"
    assert ended(before)[0] == STUCK_STATUS


def test_a_process_whose_interpreter_is_held_is_ended_by_pythons_own_watchdog() -> None:
    before = (
        "import logging; sys.stderr = LoggingProxy(logging.getLogger('celery.redirected'))\n"
        "import ctypes; from code_worker.worker.judging import watchdog; watchdog._GRACE_S = 0.2"
    )
    status, said = ended(before, "dog._limit_s = 1; dog.look(); ctypes.PyDLL(None).sleep(100)")
    assert status == 1
    assert "Timeout" in said


def test_a_quiet_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", LoggingProxy(logging.getLogger("celery.redirected")))
    in_flight = InFlight()
    dog = Watchdog(in_flight, lambda: None, 100)
    with in_flight.batch(["job"]):
        dog.look()
    dog.close()


@pytest.mark.slow(reason="a worker loads the model, and its watchdog waits for the least limit there is")
@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_batch_that_hangs_in_a_worker_of_somebodys_app_ends_the_process(
    deploy: Callable[..., Deployment], tmp_path: Path, pool: str
) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "hanging.py").write_text(HANGING)
    deployment = deploy(
        f"sqlite:///{tmp_path / 'db.sqlite'}",
        THEIRS_DIRECTORY=str(tmp_path),
        CODE_WORKER_BROKER__KEY_PREFIX="null",
        CODE_WORKER_PLUGINS_DIR=str(plugins),
        CODE_WORKER_WORKER__BATCH_TIMEOUT_S="5",
    )
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(1))
    # From nothing: torch must not be loaded before a pool forks, as it is in the tests' fork server.
    celery = (
        [str(Path(sys.executable).with_name("celery"))] if pool == "prefork" else [sys.executable, "-m", "celery"]
    )
    command = [
        *(*celery, "-A", "tests.worker.foreign_app", "worker", "-l", "INFO"),
        *("--pool", pool, "--concurrency", "1", "-Q", f"{LIVE},{NORMAL},{SWEEP_QUEUE}"),
    ]
    worker = WorkerProcess(command, {**os.environ, **deployment.environment}, deployment.log_path)
    deployment.workers.append(worker)
    job = deployment.client().enqueue(str(tmp_path / "files" / "a.jpg"), metadata={"hang": True})

    def said(text: str) -> bool:
        return text in deployment.log_path.read_text(encoding="utf-8")

    if pool == "threads":
        assert worker.process.wait(120) == STUCK_STATUS
    else:
        wait_until(lambda: said(f"exitcode {STUCK_STATUS}"), 120, "the child's end")
    assert said("batch_stuck")
    assert said("in code_worker_select_head"), "the stacks name the culprit"
    stuck = deployment.store().run(lambda session: queries.get(session, job), write=False)
    assert stuck is not None
    assert stuck.attempts >= 1, "in the end it is quarantined"
