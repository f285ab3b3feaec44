"""Waits for what other processes of the demonstration do; each gives up when nothing moves any more."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker.errors import CodeWorkerError
from code_worker.store import jobs, runs, workers
from code_worker.types import JobState

if TYPE_CHECKING:
    from code_worker.store.engine import Store
    from code_worker.store.runs import Run

__all__ = ["Bar", "Progress", "Step", "await_jobs", "await_release", "await_run"]

_STALL_S: Final = 180.0
_POLL_S: Final = 0.1

Progress = Callable[[int], None]
"""Advances a bar by so much."""
Bar = Callable[[str, int], AbstractContextManager[Progress]]
"""`bar(what, total)` surrounds a long wait."""
Step = Callable[[str], AbstractContextManager[None]]
"""`step(what)` surrounds a phase."""


def await_release(store: Store, release: str, log: Path) -> None:
    """Returns once a worker judges with the release.

    Raises:
        CodeWorkerError: none does in time.
    """
    deadline = time.monotonic() + _STALL_S
    while not any(
        worker.release == release
        for worker in store.run(lambda session: workers.alive(session, within_s=_STALL_S), write=False)
    ):
        if time.monotonic() > deadline:
            raise CodeWorkerError(f"the worker did not load the release within {_STALL_S:g} s; see {log}")
        time.sleep(_POLL_S)


def await_jobs(store: Store, total: int, advance: Progress, log: Path, *, before: int = 0) -> None:
    """Returns once every job is finished, `before` of `total` having been already.

    Raises:
        CodeWorkerError: none was for a long time.
    """
    finished, last_change = before, time.monotonic()
    while finished < total:
        counts = store.run(jobs.counts, write=False)
        now = counts[JobState.DONE] + counts[JobState.QUARANTINED]
        if now > finished:
            advance(now - finished)
            finished, last_change = now, time.monotonic()
        elif time.monotonic() - last_change > _STALL_S:
            left = total - finished
            raise CodeWorkerError(f"{left} of {total} jobs are not finished, none in {_STALL_S:g} s; see {log}")
        time.sleep(_POLL_S)


def await_run(store: Store, advance: Progress, log: Path) -> Run:
    """The one run of this database, once it has ended; advances with its epochs.

    Raises:
        CodeWorkerError: none begins, or it gives no sign of life for a long time.
    """
    epochs, seen, last_change = 0, None, time.monotonic()
    while True:
        run = next(iter(store.run(lambda session: runs.list_runs(session, limit=1), write=False)), None)
        if run is not None:
            measured = len(store.run(partial(runs.metrics, run_id=run.id), write=False))
            advance(measured - epochs)
            epochs = measured
            if run.finished_at is not None:
                return run
        if (sign := run and (run.stage, run.heartbeat_at)) != seen:
            seen, last_change = sign, time.monotonic()
        elif time.monotonic() - last_change > _STALL_S:
            what = "began no run" if run is None else f"gave no sign of life in stage {run.stage}"
            raise CodeWorkerError(f"the trainer {what} for {_STALL_S:g} s; see {log}")
        time.sleep(_POLL_S)
