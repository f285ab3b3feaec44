"""Tells the end of this process from one that a plugin asks for."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from functools import partial
from types import CodeType
from typing import Final

__all__ = ["raise_if_stop"]

_STOPPERS: Final = frozenset({"billiard", "celery", "code_worker", "kombu"})
"""Packages whose SystemExit ends the process, whatever it was about."""


def raise_if_stop(error: BaseException) -> None:
    """Raises a SystemExit again that ends this process on purpose; returns for all else.

    To be called first where what a plugin raises is caught: a plugin that calls `sys.exit` has failed like any other.
    But the handler of a signal breaks into what runs, a plugin too. Then the innermost frame is ours or Celery's, or
    the handler, whoever it belongs to, is among the frames.
    """
    if not isinstance(error, SystemExit):
        return
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    innermost = frames[-1].f_globals.get("__name__", "") if frames else ""
    handlers = set(_handlers())
    if innermost.partition(".")[0] in _STOPPERS or any(frame.f_code in handlers for frame in frames):
        raise error


def _handlers() -> Iterator[CodeType]:
    """What runs when a signal comes: functions, methods, or objects that can be called."""
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
