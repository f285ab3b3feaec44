"""Ctrl-C ends a command also where what it raises is lost on the way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted: list[bool] = []


@contextmanager
def noted_interrupts() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt, as ever, and is remembered for `check_interrupt`.

    Python drops an exception that is raised while it collects garbage or runs a finalizer or a library's callback.
    A handler that somebody else installed, or a shell that ignores the signal, is left alone.
    """
    _noted.clear()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check_interrupt() -> None:
    """Called at each turn of long work; does nothing unless a SIGINT came.

    Raises:
        KeyboardInterrupt: it did, and the work goes on all the same.
    """
    if _noted:
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(True)
    signal.default_int_handler(number, frame)
