"""Cores and memory that this process may use, and clocks that stay right when it is stopped or they are set.

A container's limits stand in the files of its control groups: of version 2, or of version 1 with a directory for each
controller; every group above a process's own limits it, too.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_DECODE_BYTES: Final = 280_000_000
_DECODE_SHARE: Final = 4
"""A quarter of what a container may have, as a Java machine takes for its heap: the rest is for model and files."""
_ROOT: Final = Path("/")
_LIBRARY_THREADS: Final = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_TICK_S: Final = 0.25
_LONGEST_TICK_S: Final = 0.5
"""What a tick counts at most; on a busy machine a wait is longer than it was meant to be."""


def usable_cores(root: Path = _ROOT) -> int:
    """Cores this process may run on, which `taskset` or a container's quota may have narrowed, rounded up.

    Args:
        root: Where `/proc` and `/sys` are found.
    """
    return min([_allowed_cores(), *(math.ceil(quota) for quota in _cpu_quotas(root))])


def library_threads(root: Path = _ROOT) -> dict[str, str]:
    """Variables that keep a new process's BLAS and OpenMP to the quota, of which these libraries know nothing.

    None where there is no quota to keep to, and none where somebody chose a number.

    Args:
        root: Where `/proc` and `/sys` are found.
    """
    cores = usable_cores(root)
    if cores == _allowed_cores() or any(name in os.environ for name in _LIBRARY_THREADS):
        return {}
    return dict.fromkeys(_LIBRARY_THREADS, str(cores))


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes that this process's control groups may use together; None where nothing limits them.

    Args:
        root: Where `/proc` and `/sys` are found.
    """
    limits = []
    for group in _control_groups("memory", root):
        limits += [words[0] for name in ("memory.max", "memory.limit_in_bytes") if (words := _numbers(group / name))]
    # Version 1 writes the largest number of pages there is where it has no limit.
    return min((int(limit) for limit in limits if 0 < limit < 2**60), default=None)


def usable_memory(root: Path = _ROOT) -> int:
    """Bytes that this process and those beside it may use: the machine's memory, or less where a limit is lower.

    Args:
        root: Where `/proc` and `/sys` are found.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, memory_limit(root) or machine)


def decode_memory(root: Path = _ROOT) -> int:
    """Bytes that one process decodes in unless told: as many as 50 million pixels take, or a quarter of its limit.

    Args:
        root: Where `/proc` and `/sys` are found.
    """
    limit = memory_limit(root)
    return _DECODE_BYTES if limit is None else min(_DECODE_BYTES, max(1, limit // _DECODE_SHARE))


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group of this process has."""
    for group in _control_groups("cpu", root):
        shares = [_numbers(group / "cpu.max")]
        shares.append([*_numbers(group / "cpu.cfs_quota_us"), *_numbers(group / "cpu.cfs_period_us")])
        yield from (share[0] / share[1] for share in shares if len(share) == 2 and min(share) > 0)


def _numbers(file: Path) -> list[float]:
    """The numbers of a limit; none where there is no such file, or it says `max`."""
    try:
        return [float(word) for word in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        return []


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Directories of the control groups that this process is in, from the innermost outwards.

    A container sees its own group at the top, though its path may be that of the machine: what is not there is left
    out.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        # A process in a group outside of its container's view has a path that leads up: only the top is known there.
        inner = () if ".." in path else Path(path).parts[1:]
        yield from (group for depth in range(len(inner), -1, -1) if (group := top.joinpath(*inner[:depth])).is_dir())


def uptime_s() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine sleeps."""
    # Linux's monotonic clock stands still while the machine sleeps; leases and timeouts of servers do not.
    boot_clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot_clock is None else time.clock_gettime(boot_clock)


class ServerClock:
    """A server's time between two looks at it, so that what several machines date is in one order.

    It is carried on by `uptime_s`: a clock of this machine that is set an hour ahead moves nothing. Until the server
    was looked at, it is this machine's time.
    """

    def __init__(self) -> None:
        # One value that is replaced whole: threads that share this clock need no lock.
        self._ahead_s: float | None = None

    def agree(self, there_s: float) -> None:
        """Takes over the server's time, in Unix seconds, that was read a moment ago."""
        self._ahead_s = there_s - uptime_s()

    def now_s(self) -> float:
        """Seconds since 1970."""
        ahead_s = self._ahead_s
        return time.time() if ahead_s is None else uptime_s() + ahead_s


def jittered(seconds: float, share: float = 0.5) -> float:
    """A time drawn evenly from `seconds` ± that share of it: those who wait for one thing do not return together."""
    return seconds * random.uniform(1.0 - share, 1.0 + share)  # noqa: S311 - a wait, not a secret


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
