"""Who runs a command, for roles and for the records of changes."""

from __future__ import annotations

from code_worker.roles import current_user

__all__ = ["who"]


def who() -> str:
    """The user that this process runs as."""
    return current_user()
