"""Processes: what a fork must not take along, whose end is meant, and a child's tie to its supervisor.

`python -m code_worker.system.processes PROGRAM …` runs a program that ends when its supervisor does, even
when that was killed outright.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType
from typing import Final
from weakref import WeakMethod

OWNER_ENV: Final = "CODE_WORKER_OWNER"


def call_if_alive(method: WeakMethod[Callable[[], None]]) -> None:
    """Calls a method whose object may be gone: what is registered for forks stays registered for ever."""
    if (alive := method()) is not None:
        alive()


_STOPPERS: Final = frozenset({"billiard", "celery", "code_worker", "kombu"})
"""Packages whose SystemExit ends the process, for any reason."""


def raise_if_stop(error: BaseException) -> None:
    """Raises a SystemExit again that ends this process on purpose; returns for all else.

    To be called first where what a plugin raises is caught: a plugin that calls `sys.exit` has failed like any other.
    But the handler of a signal breaks into what runs, a plugin too. Then the innermost frame is ours or Celery's, or
    the handler is among the frames.
    """
    if not isinstance(error, SystemExit):
        return
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    innermost = frames[-1].f_globals.get("__name__", "") if frames else ""
    handlers = set(_handlers())
    if innermost.partition(".")[0] in _STOPPERS or any(frame.f_code in handlers for frame in frames):
        raise error


def _handlers() -> Iterator[CodeType]:
    """Yields what runs when a signal comes: functions, methods, or objects that can be called."""
    for number in signal.valid_signals():
        handler: object = signal.getsignal(number)
        if isinstance(handler, signal.Handlers):  # what the system does; its class is called for every enum
            continue
        while isinstance(handler, partial):
            handler = handler.func
        called = getattr(type(handler), "__call__", None)  # noqa: B004 - for its code
        for function in (handler, getattr(handler, "__func__", None), called):
            if isinstance(code := getattr(function, "__code__", None), CodeType):
                yield code


SUPERVISOR_ENV: Final = "CODE_WORKER_SUPERVISOR_PID"
_PR_SET_PDEATHSIG: Final = 1
_POLL_S: Final = 0.5


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Makes the system send `number` to this process once its supervisor is gone.

    Does nothing in a process that no supervisor started. Call it first, before anything slow.

    A worker that lost its supervisor is not asked politely: its broker may be gone too, and what it had claimed
    comes back through its lease.
    """
    expected = os.environ.pop(SUPERVISOR_ENV, "")  # not for this process's own children
    if not expected.isdigit():
        return
    parent = int(expected)
    if sys.platform == "linux":
        _ask_kernel(number)
    else:
        threading.Thread(target=_watch, args=(parent, number), name="lifeline", daemon=True).start()
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), number)


def _ask_kernel(number: signal.Signals) -> None:
    """Linux's own parent-death signal; it outlives exec."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _watch(parent: int, number: signal.Signals) -> None:
    while os.getppid() == parent:
        # Nothing but Linux tells of a parent's end; an orphan gets another parent, which can be looked at.
        time.sleep(_POLL_S)
    os.kill(os.getpid(), number)


def main() -> None:
    """Ties this process, then replaces it by the command in its arguments."""
    die_with_parent(signal.SIGTERM)
    # The tie outlives exec, and the process id stays: the supervisor signals the program itself, not a wrapper.
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - the supervisor's own command, no shell


if __name__ == "__main__":
    main()
