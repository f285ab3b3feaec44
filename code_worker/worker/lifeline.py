"""A child's tie to its supervisor: it ends when the supervisor does, even when that was killed outright.

`python -m code_worker.worker.lifeline COMMAND…` ties itself, then becomes COMMAND: for programs that are not ours.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Final

__all__ = ["SUPERVISOR_ENV", "die_with_parent"]

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
        time.sleep(_POLL_S)
    os.kill(os.getpid(), number)


def main() -> None:
    """Ties this process, then replaces it by the command in its arguments."""
    die_with_parent(signal.SIGTERM)
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - the supervisor's own command, no shell


if __name__ == "__main__":
    main()
