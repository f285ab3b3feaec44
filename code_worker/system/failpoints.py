"""Places at which a test may end this process, by `CODE_WORKER_FAILPOINT=name[:exit|raise|hang]`; else nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final, NoReturn

FAILPOINT_ENV: Final = "CODE_WORKER_FAILPOINT"
FAILPOINT_STATUS: Final = 71
"""Exit status of a process that ended at a failpoint."""
NAMES: Final = frozenset(
    {
        "after_claim",
        "before_verdict_commit",
        "after_verdict_commit",
        "before_ack",
        "before_upload",
        "mid_upload",
        "after_upload",
        "before_promotion",
        "mid_promotion",
        "after_promotion",
        "mid_run_promotion",
    }
)


class FailpointError(Exception):
    """Raised by `name:raise`: no error of ours, so that it is met as a bug is."""


def _exit(_: str) -> NoReturn:
    # Past all cleaning up, as SIGKILL would: what is tested is what such an end leaves behind.
    os._exit(FAILPOINT_STATUS)


def _raise(name: str) -> NoReturn:
    raise FailpointError(name)


def _hang(_: str) -> None:
    threading.Event().wait()


_ACTIONS: Final = {"exit": _exit, "raise": _raise, "hang": _hang}


def _nothing(_: str) -> None:
    """No failpoint is armed."""


def armed(specification: str) -> Callable[[str], None]:
    """Returns what to call at each failpoint.

    Raises:
        ValueError: a name or an action that there is not.
    """
    if not specification:
        return _nothing
    wanted, _, action = specification.partition(":")
    act = _ACTIONS.get(action or "exit")
    if wanted not in NAMES or act is None:
        raise ValueError(f"{FAILPOINT_ENV}={specification}: one of {sorted(NAMES)}, then :exit, :raise or :hang")

    def reached(name: str) -> None:
        if name == wanted:
            act(name)

    return reached


failpoint = armed(os.environ.get(FAILPOINT_ENV, ""))
"""Called with its name where a process may be made to end; bound once, to nothing unless the variable is set."""
