"""Ctrl-C ends what waits, whenever it comes and whatever swallows its exception."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from code_worker.cli.common.interrupts import check_interrupt, noted_interrupts
from code_worker.store import jobs
from code_worker.store.engine import Store
from tests.fork_server import forking_python
from tests.patience import LIMIT_S

Start = Callable[..., subprocess.Popen[str]]
# Garbage is collected at any moment; what is raised meanwhile is printed and dropped.
LOST = """
import gc, signal, time
from code_worker.cli.main import main

begun = time.monotonic()
def collected(phase, info):
    listens = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if phase == "stop" and listens and time.monotonic() > begun + {after_s} and not asked:
        asked.append(True)
        signal.raise_signal(signal.SIGINT)
asked = []
gc.callbacks.append(collected)
gc.set_threshold(50)
main()
"""
PLAIN = "from code_worker.cli.main import main; print('begun', flush=True); main()"


@pytest.fixture
def waiting(sqlite_store: Store, tmp_path: Path) -> Iterator[Start]:
    """Starts `enqueue --wait` for a job that nobody judges."""
    env = {**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_DATABASE_URL": sqlite_store.url}
    with ExitStack() as started:

        def start(code: str, *named: str) -> subprocess.Popen[str]:
            words = [forking_python(), "-c", code, "enqueue", *(named or ["s3://b/a.jpg"]), "--wait"]
            pipe = subprocess.PIPE
            process = started.enter_context(subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe, text=True))
            started.callback(process.kill)
            return process

        yield start


@pytest.mark.parametrize("after_s", [0.0, 1.0, 4.0])
def test_an_interrupt_whose_exception_is_lost_ends_the_wait(waiting: Start, after_s: float) -> None:
    process = waiting(LOST.format(after_s=after_s))
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "Exception ignored in" in said
    assert said.endswith("Aborted!\n")


def test_an_interrupt_ends_the_wait_at_any_moment(waiting: Start) -> None:
    draw = random.Random(11)
    for _ in range(8):
        process = waiting(PLAIN)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n", "before that it is not our program yet"
        time.sleep(draw.uniform(0.0, 3.0))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
        assert process.returncode in {1, -signal.SIGINT, 128 + signal.SIGINT, 130}, said


def test_who_stops_waiting_hears_what_will_still_be_judged(
    sqlite_store: Store, waiting: Start, tmp_path: Path
) -> None:
    (tmp_path / "list").write_text("".join(f"s3://b/{number}.jpg\n" for number in range(30)))
    process = waiting(PLAIN, "--from", str(tmp_path / "list"))
    assert process.stderr is not None
    # Why they wait is said once all are accepted.
    assert any("jobs wait: " in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=LIMIT_S)
    found = sqlite_store.run(lambda session: jobs.list_jobs(session, limit=100), write=False)
    told = {tuple(line.split()[-2:]) for line in said.splitlines() if "accepted all the same: " in line}
    assert told == {(job.id, job.uri) for job in found if int(Path(job.uri).stem) < 20}
    assert "30 jobs were accepted and will still be judged:\n" in said
    assert "and 10 more: code-worker jobs list\n" in said
    assert "just then" not in said
    assert process.returncode == 1


def test_a_noted_interrupt_is_raised_until_the_block_ends() -> None:
    with noted_interrupts():
        check_interrupt()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with noted_interrupts():
        check_interrupt()


def test_a_handler_of_somebody_else_is_left_alone() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with noted_interrupts():
            signal.raise_signal(signal.SIGINT)
            check_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
