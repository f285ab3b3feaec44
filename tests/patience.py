"""How long tests wait for what must come: long, and by their own looks instead of the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

__all__ = ["LIMIT_S", "polls"]

LIMIT_S: Final = 120.0
"""Ends a test that hangs. Nothing takes as long, but a shared machine may be slow, or stand still for a while."""
_LONGEST_S: Final = 0.25


def polls(limit_s: float = LIMIT_S, every_s: float = 0.05) -> Iterator[None]:
    """Yields for `limit_s` in all; a turn counts one second at most, even if the machine stood still meanwhile.

    The longer it waited, the longer the turns, up to a quarter of a second: looking takes processor time from what
    is waited for.
    """
    left_s = limit_s
    while left_s > 0:
        began = time.monotonic()
        yield
        time.sleep(max(every_s, min(_LONGEST_S, (limit_s - left_s) / 10)))
        left_s -= min(time.monotonic() - began, 1.0)
