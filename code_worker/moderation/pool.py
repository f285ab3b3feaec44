"""A thread pool that serves urgent work first, for fetching and decoding."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, Self, TypeVar

__all__ = ["PriorityPool"]

P = ParamSpec("P")
R = TypeVar("R")
_LAST = (float("inf"),)


class PriorityPool:
    """Threads that take the lowest rank first, and in order of arrival within one rank.

    The standard library's executor knows one order only, in which a live image would wait behind a backfill.
    """

    def __init__(self, threads: int, name: str = "fetch") -> None:
        if threads < 1:
            raise ValueError(f"a pool needs at least one thread, not {threads}")
        self._queue: queue.PriorityQueue[tuple[tuple[float, ...], int, Callable[[], None] | None]] = (
            queue.PriorityQueue()
        )
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

    def submit(self, rank: tuple[float, ...], work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Queues `work`; lower ranks, compared as tuples are, run first.

        Raises:
            RuntimeError: the pool was closed.
        """
        if self._closed:
            raise RuntimeError("the pool is closed")
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - a future carries whatever was raised to its owner
                future.set_exception(error)
            else:
                future.set_result(result)

        self._queue.put((rank, next(self._order), run))
        return future

    def close(self) -> None:
        """Runs what is queued, then ends the threads."""
        self._closed = True
        for _ in self._threads:
            self._queue.put((_LAST, next(self._order), None))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (run := self._queue.get()[2]) is not None:
            run()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
