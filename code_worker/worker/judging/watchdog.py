"""Ends a process in which a batch is stuck or the device is lost: threads cannot be stopped."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any, Final

from code_worker.logs import get_logger


class InFlight:
    """Batches under way, with the time of each one's last sign of life."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = count()
        # Both have the same keys, a number for each batch under way; `_lock` guards adding and removing them.
        self._jobs: dict[int, tuple[str, ...]] = {}
        self._alive: dict[int, float] = {}

    @contextmanager
    def batch(self, job_ids: Sequence[str]) -> Iterator[Callable[[], None]]:
        """Registers a batch for as long as its block runs; yields what to call at each step it makes."""
        number = next(self._numbers)

        def progress() -> None:
            # Without the lock: it replaces the value of a key that is
            # there, on the batch's own thread, never after its block.
            self._alive[number] = time.monotonic()

        with self._lock:
            self._jobs[number] = tuple(job_ids)
            progress()
        try:
            yield progress
        finally:
            with self._lock:
                del self._jobs[number], self._alive[number]

    def jobs(self) -> list[str]:
        """Ids of every job under way."""
        with self._lock:
            return [job for jobs in self._jobs.values() for job in jobs]

    def silent_s(self) -> float:
        """Seconds since the batch that has been silent longest made a step; 0 when there is none."""
        with self._lock:
            return time.monotonic() - min(self._alive.values()) if self._alive else 0.0


log = get_logger(__name__)
STUCK_STATUS: Final = 70
"""Exit status of a process whose watchdog ended it."""
_LONGEST_S: Final = 5.0
_GRACE_S: Final = 30.0


class Watchdog:
    """Looks at the batches under way and at the device; the supervisor starts another.

    Celery's time limits do not reach the threads of a pool, so a batch that hangs would hold its slot for ever. Where
    C code holds the interpreter, no thread of Python's looks at anything: then Python's own watchdog, armed anew at
    every look, writes all stacks and ends the process with status 1.
    """

    def __init__(
        self, in_flight: InFlight, device_failure: Callable[[], BaseException | None], limit_s: float
    ) -> None:
        """Begins to watch at the first `look`.

        Args:
            in_flight: the batches under way.
            device_failure: what ended the device, if anything did.
            limit_s: how long a batch may be silent.
        """
        self.interval_s = min(_LONGEST_S, limit_s / 4)
        self._in_flight = in_flight
        self._device_failure = device_failure
        self._limit_s = limit_s
        self._stacks = _own_stderr()

    def look(self) -> None:
        """Ends the process if it must end, else arms Python's watchdog until after the next look."""
        if (failure := self._device_failure()) is not None:
            self._end("device_lost", error=str(failure))
        silent_s = self._in_flight.silent_s()
        if silent_s > self._limit_s:
            self._end("batch_stuck", silent_s=round(silent_s, 1), jobs=self._in_flight.jobs())
        # Last: an error in arming it must not prevent the two looks before it.
        faulthandler.dump_traceback_later(self._limit_s + _GRACE_S, exit=True, file=self._stacks)

    def _end(self, event: str, **facts: object) -> None:
        try:
            log.critical(event, **facts)
            faulthandler.dump_traceback(self._stacks)
        finally:
            # Not sys.exit: the thread that is stuck would be waited for.
            os._exit(STUCK_STATUS)

    def close(self) -> None:
        """Disarms Python's watchdog."""
        faulthandler.cancel_dump_traceback_later()


def _own_stderr() -> IO[Any]:
    """A file with a descriptor that takes stacks: the process's stderr, or nothing at all where that is closed.

    In a worker of somebody's app `sys.stderr` is a logger that Celery put there. A bare 2 would not do: in a process
    that was started without a stderr that number may be the database's.
    """
    for stream in (sys.stderr, sys.__stderr__):
        try:
            if stream is not None and os.fstat(stream.fileno()):
                return stream
        except (AttributeError, OSError, ValueError):
            continue
    return Path(os.devnull).open("w", encoding="utf-8")
