"""What this process may use of its machine, and clocks that do not lie when it is stopped or set."""

from __future__ import annotations

import os
import threading
import time
from typing import Final

__all__ = ["ServerClock", "uptime_s", "usable_cores", "wait_for"]

_TICK_S: Final = 0.25
_LONGEST_TICK_S: Final = 0.5
"""What a tick counts at most; on a busy machine a wait is longer than it was meant to be."""


def usable_cores() -> int:
    """Cores this process may run on, which a container or `taskset` may have narrowed."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def uptime_s() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine sleeps."""
    boot_clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot_clock is None else time.clock_gettime(boot_clock)


class ServerClock:
    """A server's time between two looks at it, so that what several machines date is in one order.

    It is carried on by `uptime_s`: a clock of this machine that is set an hour ahead moves nothing. Until the server
    was looked at, it is this machine's time.
    """

    def __init__(self) -> None:
        self._ahead_s: float | None = None

    def agree(self, there_s: float) -> None:
        """Takes over the server's time, in Unix seconds, that was read a moment ago."""
        self._ahead_s = there_s - uptime_s()

    def now_s(self) -> float:
        """Seconds since 1970."""
        ahead_s = self._ahead_s
        return time.time() if ahead_s is None else uptime_s() + ahead_s


def wait_for(event: threading.Event, limit_s: float) -> bool:
    """Waits for an event for `limit_s` at most in which this process could run; whether it came.

    While a process is stopped or its machine stands still, its peers cannot be late: a tick of this wait counts as
    half a second at most, however long it was.
    """
    left_s = limit_s
    while left_s > 0:
        began = time.monotonic()
        if event.wait(min(_TICK_S, left_s)):
            return True
        left_s -= min(time.monotonic() - began, _LONGEST_TICK_S)
    return event.is_set()
