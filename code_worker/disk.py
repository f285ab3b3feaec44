"""What directories and files are beside their bytes: private, on disk, or only a stand-in for another file."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["flush", "is_lfs_pointer", "make_private"]

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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


def flush(path: Path) -> None:
    """Returns when a file's bytes, or a directory's entries, would outlive a loss of power.

    Raises:
        OSError: it is not there, or its disk does not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git left the name of a large file here and not its content; False also where nothing can be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False
