"""Directories that nobody but their owner may enter."""

from __future__ import annotations

from pathlib import Path

__all__ = ["make_private"]


def make_private(directory: Path) -> None:
    """Makes a directory and what is missing above it, all of it private; what is there stays as it is.

    `Path.mkdir` gives its mode to the last directory alone: whatever is made first would open the data directory.

    Raises:
        OSError: it cannot be made, or something else is in its place.
    """
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        if directory == directory.parent:
            break
        directory = directory.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
