"""What a process that forks must not take along."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod

__all__ = ["call_if_alive"]


def call_if_alive(method: WeakMethod[Callable[[], None]]) -> None:
    """Calls a method whose object may be gone: what is registered for forks stays registered for ever."""
    if (alive := method()) is not None:
        alive()
