"""How long tests wait for what must come: long, and by their own looks instead of the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

__all__ = ["LIMIT_S", "polls"]

LIMIT_S: Final = 120.0
"""Ends a test that hangs. Nothing takes as long, but a shared machine may be slow, or stand still for a while."""


def polls(limit_s: float = LIMIT_S, every_s: float = 0.05) -> Iterator[None]:
    """Yields for `limit_s` in all; a turn counts one second at most, even if the machine stood still meanwhile."""
    left_s = limit_s
    while left_s > 0:
        began = time.monotonic()
        yield
        time.sleep(every_s)
        left_s -= min(time.monotonic() - began, 1.0)
