"""A thread pool that serves urgent work first, for fetching and decoding."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Self

from code_worker.logs import get_logger

log = get_logger(__name__)

_LAST = (float("inf"),)


class PriorityPool:
    """Threads that take the lowest rank first, and in order of arrival within one rank.

    The standard library's executor knows one order only, in which a live image would wait behind a backfill.
    """

    def __init__(self, threads: int, name: str = "fetch") -> None:
        if threads < 1:
            raise ValueError(f"a pool needs at least one thread, not {threads}")
        self._queue: queue.PriorityQueue[tuple[tuple[float, ...], int, Callable[[], object] | None]] = (
            queue.PriorityQueue()
        )
        # Breaks ties by arrival; without it the queue would compare functions. `next` of a count needs no lock.
        self._order = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        self._closed = False
        for thread in self._threads:
            thread.start()

    @property
    def size(self) -> int:
        """Number of threads."""
        return len(self._threads)

    def submit(self, rank: tuple[float, ...], work: Callable[[], object]) -> None:
        """Queues `work`; lower ranks, compared as tuples are, run first. What it raises is logged and goes to nobody.

        There is no future: making, filling and watching one costs more than fetching a small image from memory.

        Raises:
            RuntimeError: the pool was closed.
        """
        if self._closed:
            raise RuntimeError("the pool is closed")
        self._queue.put((rank, next(self._order), work))

    def close(self) -> None:
        """Runs what is queued, then ends the threads."""
        self._closed = True
        # One end for each thread, behind all work.
        for _ in self._threads:
            self._queue.put((_LAST, next(self._order), None))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (work := self._queue.get()[2]) is not None:
            try:
                work()
            except Exception:
                # A thread less would only make the worker slower, without a word.
                log.exception("pool_work_failed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
