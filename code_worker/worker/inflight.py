"""What this process holds claims on, so that leases are renewed and a batch that hangs is noticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

__all__ = ["InFlight"]


class InFlight:
    """Batches under way, with the time of each one's last sign of life."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = count()
        self._jobs: dict[int, tuple[str, ...]] = {}
        self._alive: dict[int, float] = {}

    @contextmanager
    def batch(self, job_ids: Sequence[str]) -> Iterator[Callable[[], None]]:
        """Registers a batch for as long as its block runs; yields what to call at each step it makes."""
        number = next(self._numbers)

        def progress() -> None:
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
