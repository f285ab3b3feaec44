"""Who runs a command, for the records of changes."""

from __future__ import annotations

import getpass
import os

__all__ = ["who"]


def who() -> str:
    """The user's name, or number where it has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
