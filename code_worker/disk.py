"""What files and directories are beside their bytes: a place, private, on disk, or a stand-in for another file."""

from __future__ import annotations

import os
from pathlib import Path

from code_worker.errors import ConfigurationError

__all__ = ["expanded", "flush", "forbidden", "is_lfs_pointer", "make_private", "no_file"]

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def expanded(path: Path, setting: str) -> Path:
    """The absolute form of a path that may begin with `~`.

    Raises:
        ConfigurationError: it does, and this user has no home: no `HOME`, or an empty one, and no entry of a password
            file, as in containers that run as any number. It names the setting to write another path into.
    """
    try:
        if path.parts[:1] == ("~",) and not os.environ.get("HOME", "unset").strip():
            raise RuntimeError
        return path.expanduser().absolute()
    except RuntimeError:
        raise ConfigurationError(
            f"{path} is in a home directory, and this user has none: set {setting} to an absolute path"
        ) from None


def no_file(path: Path, setting: str) -> Path:
    """The path of a directory that may not be there yet.

    Raises:
        ConfigurationError: a file is in its place, or on the way to it; it names the setting.
    """
    for each in (path, *path.parents):
        try:
            if each.is_dir():
                return path
            if each.exists():
                where = "which" if each == path else f"and {each}"
                raise ConfigurationError(f"{setting} names {path}, {where} is a file: name a directory")
        except PermissionError:
            return path  # what comes to use it says so
    return path


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


def forbidden(path: Path) -> str:
    """That this process may not use what is in the data directory, for an error."""
    user = f"user {os.getuid()}" if hasattr(os, "getuid") else "this user"
    return f"{user} has no rights on {path}: give them, or set CODE_WORKER_DATA_DIR to a directory of that user"


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
