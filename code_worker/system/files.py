"""Files and directories: whole writes, locks, private directories, and stand-ins for other files."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from code_worker.errors import ConfigurationError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_POLL_S = 0.2


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

    `Path.mkdir` gives its mode to the last directory alone: parents would open the data directory.

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
        # Another process may be making the same ones.
        each.mkdir(mode=0o700, exist_ok=True)


def forbidden(path: Path) -> str:
    """Returns that this process may not use what is in the data directory, for an error."""
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


@contextmanager
def whole_file(
    path: Path, *, private: bool = False, durable: bool = True, beside: Path | None = None
) -> Iterator[Path]:
    """An empty file to write to, which takes the place of `path` when the block ends; a reader never sees half of it.

    When the block fails it is removed, and what was at `path` stays. A process that is killed leaves it behind, under
    a name that begins with a dot and ends with `.partial`.

    Args:
        path: the file to be.
        private: readable by its owner alone; otherwise as the process's umask says.
        durable: bytes and name outlive a loss of power when the block has ended.
        beside: the directory to write in, on the same file system; unset: that of `path`.

    Raises:
        OSError: it cannot be written.
    """
    partial = _partial(path, beside)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
    try:
        yield partial
        if durable:
            # The bytes before the name: in the other order a loss of power could leave the new name on an empty file.
            flush(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if durable:
        # The name itself is an entry of the directory, which is a file to be flushed too.
        flush(path.parent)


@contextmanager
def whole_directory(path: Path, *, durable: bool = False, beside: Path | None = None) -> Iterator[Path]:
    """An empty directory that becomes `path`, and replaces what is there, when the block ends; see `whole_file`.

    A directory cannot be replaced in one step: for a moment there is none, and after a crash there may be none.

    Raises:
        OSError: it cannot be written.
    """
    partial = _partial(path, beside)
    partial.mkdir(parents=True)
    try:
        yield partial
        if durable:
            # Before the rename: a name that outlives a loss of power must not lead to bytes that did not.
            for parent, _, names in os.walk(partial):
                for each in (*(Path(parent) / name for name in names), Path(parent)):
                    flush(each)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if durable:
        flush(path.parent)


def _partial(path: Path, beside: Path | None = None) -> Path:
    path = path.absolute()
    return (beside or path.parent) / f".{path.name}.{secrets.token_hex(4)}.partial"


@contextmanager
def locked(
    path: Path, *, wait_s: float = 0.0, check: Callable[[], object] = lambda: None, create: bool = True
) -> Iterator[int]:
    """Holds a file's lock (`flock`) for one process; yields the open descriptor. The system frees it however we end.

    Args:
        path: the file; its content is left as it is.
        wait_s: how long to wait for another holder.
        check: called at each look while waiting; what it raises ends the wait.
        create: make the file where there is none.

    Raises:
        BlockingIOError: another process holds it still.
        OSError: it cannot be opened.
    """
    import fcntl  # POSIX only, as all that locks; producers run elsewhere too

    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                # Asked again and again: a flock that blocks knows no
                # limit, and is begun anew after a signal's handler.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check()
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def is_lfs_pointer(path: Path) -> bool:
    """Returns whether Git left the name of a large file here and not its content.

    False also where nothing can be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False
