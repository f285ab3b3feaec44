"""Wakes Celery's event loop when a slot comes free or a connection is lost, so that it asks for the next message."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from typing import Any

from celery import Celery, bootsteps
from celery.worker.request import Request

from code_worker.worker.transport import call_when_lost, take_lost_channels

__all__ = ["WakingRequest", "add_waker"]


class _Waker(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """A pipe that the consumer's event loop reads.

    A pool thread acknowledges a message while the loop sleeps, in Celery 5.6 for a second or more, and only the loop
    asks Redis for the next message: a free slot would stay empty, and a live job wait, for that long.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Lets the loop read the pipe; again after every reconnect."""
        if consumer.hub is not None:
            consumer.hub.add_reader(_pipe()[0], _drain, consumer)

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


def _drain(consumer: Any) -> None:
    with suppress(BlockingIOError):
        os.read(_pipe()[0], 4096)
    # A channel that was given up before is no news.
    consuming = getattr(consumer.task_consumer, "channel", None)
    if any(channel is consuming for channel in take_lost_channels()):
        raise ConnectionResetError("the broker did not take an acknowledgement")


def _wake() -> None:
    # Full: it is awake anyway.
    with suppress(BlockingIOError):
        os.write(_pipe()[1], b"\0")


class WakingRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """A request that wakes the loop once it is acknowledged or put back."""

    def acknowledge(self) -> None:
        """Acknowledges the message, then wakes the loop."""
        super().acknowledge()
        _wake()

    def reject(self, requeue: bool = False) -> None:
        """Rejects the message, then wakes the loop."""
        super().reject(requeue=requeue)
        _wake()


def add_waker(app: Celery) -> None:
    """Gives the app's workers the pipe; workers without an event loop do without."""
    call_when_lost(_wake)
    app.steps["consumer"].add(_Waker)
