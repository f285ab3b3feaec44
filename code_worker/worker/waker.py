"""Wakes Celery's event loop when a slot comes free, so that the next message is asked for at once."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from typing import Any

from celery import Celery, bootsteps
from celery.worker.request import Request

from code_worker.logs import get_logger

__all__ = ["WakingRequest", "add_waker"]

log = get_logger(__name__)


class _Waker(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """A pipe that the consumer's event loop reads.

    A pool thread acknowledges a message while the loop sleeps, in Celery 5.6 for a second or more, and only the loop
    asks Redis for the next message: a free slot would stay empty, and a live job wait, for that long.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Lets the loop read the pipe; again after every reconnect."""
        if consumer.hub is not None:
            read_end, _ = _pipe()
            consumer.hub.add_reader(read_end, _drain, read_end)

    def stop(self, consumer: Any) -> None:
        """Lets the loop forget the pipe."""
        if consumer.hub is not None:
            consumer.hub.remove(_pipe()[0])

    shutdown = stop


@lru_cache(maxsize=1)
def _pipe() -> tuple[int, int]:
    """The process's one pipe; never closed, since its number might be a database's socket a moment later."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    return read_end, write_end


def _drain(read_end: int) -> None:
    with suppress(BlockingIOError):
        os.read(read_end, 4096)


def _wake() -> None:
    # Full: it is awake anyway.
    with suppress(BlockingIOError):
        os.write(_pipe()[1], b"\0")


class WakingRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """A request that wakes the loop once it is acknowledged or put back."""

    def acknowledge(self) -> None:
        """Acknowledges the message, then wakes the loop."""
        super().acknowledge()
        log.debug("message_acknowledged", message=self.id)
        _wake()

    def reject(self, requeue: bool = False) -> None:
        """Rejects the message, then wakes the loop."""
        super().reject(requeue=requeue)
        _wake()


def add_waker(app: Celery) -> None:
    """Gives the app's workers the pipe; workers without an event loop do without."""
    app.steps["consumer"].add(_Waker)
