"""Local files as a source: only regular files, only under the allowed roots, no matter what links say."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from code_worker.errors import CodeWorkerError, ImageRejectedError, TransientError
from code_worker.images.listing import has_image_suffix, is_hidden
from code_worker.system.files import expanded
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from code_worker.images.listing import LeftOut
    from code_worker.settings import FileSettings

_CHUNK_BYTES: Final = 1 << 20
# O_PATH passes through a directory that may be entered but not listed; macOS has none.
_ENTER: Final = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
# O_NONBLOCK: opening a FIFO must not wait for its writer.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_REASONS: Final = {
    errno.ENOENT: RejectReason.NOT_FOUND,
    errno.ENOTDIR: RejectReason.NOT_FOUND,
    errno.ENAMETOOLONG: RejectReason.NOT_FOUND,
    errno.EACCES: RejectReason.ACCESS_DENIED,
    errno.EPERM: RejectReason.ACCESS_DENIED,
    errno.ELOOP: RejectReason.SOURCE_NOT_ALLOWED,
    errno.EMLINK: RejectReason.SOURCE_NOT_ALLOWED,
    errno.ENXIO: RejectReason.SOURCE_NOT_ALLOWED,
    errno.ENODEV: RejectReason.SOURCE_NOT_ALLOWED,
    errno.EOPNOTSUPP: RejectReason.SOURCE_NOT_ALLOWED,
}
"""What the file itself is to blame for; any other errno (a full table, a lost mount) may pass."""


class FileSource:
    """Reads files under the roots of the settings; safe to share between threads."""

    def __init__(self, settings: FileSettings, *, max_bytes: int) -> None:
        self._roots = tuple(expanded(root, "CODE_WORKER_FILES__ROOTS") for root in settings.roots)
        self._max_bytes = max_bytes

    def fetch(self, uri: str) -> bytes:
        """Reads one file.

        The path is resolved first and then walked from its root without following any link, so a link put in its
        place meanwhile leads nowhere.

        Args:
            uri: `file:///absolute/path`, percent-encoded, or a plain path.

        Raises:
            ImageRejectedError: it may not be read, is not there, is no regular file or is too large.
            TransientError: the file system failed.
        """
        return self._opened(uri, self._read)

    def peek(self, uri: str, size: int) -> bytes:
        """The first bytes of one file, at most so many; raises as `fetch`."""
        return self._opened(uri, partial(self._read_first, size=size))

    def _opened(self, uri: str, read: Callable[[int, str], bytes]) -> bytes:
        path = local_path(uri)
        root, parts = self._locate(path)
        try:
            descriptor = _open_under(root, parts)
        except OSError as error:
            raise _translated(error, path) from error
        try:
            return read(descriptor, path)
        except OSError as error:
            raise _translated(error, path) from error
        finally:
            os.close(descriptor)

    def list(self, prefix: str, left_out: LeftOut | None = None) -> Iterator[str]:
        """Regular files under a directory, recursively, each directory in the order of its names.

        Links to directories are not followed; links to files are listed and judged by `fetch`. A file lists itself.
        URIs are given for a URI, paths for a path (a URI where a name is no text).

        Args:
            prefix: the directory.
            left_out: where given, hidden files and directories are passed over and noted in it, and a directory below
                that cannot be listed is noted too, instead of ending the list.

        Raises:
            ImageRejectedError: the place may not be read or is not there.
            TransientError: the file system failed.
        """
        path = local_path(prefix)
        self._locate(path)
        as_uris = prefix.startswith("file:")
        try:
            mode = Path(path).stat().st_mode
        except OSError as error:
            raise _translated(error, path) from error
        files = _walk(path, left_out) if stat.S_ISDIR(mode) else iter((path,))
        return (Path(file).absolute().as_uri() if as_uris else storable(file) for file in files)

    def _locate(self, path: str) -> tuple[str, tuple[str, ...]]:
        """Root that holds the resolved path, and the way from there; the same refusal whether or not it exists."""
        try:
            resolved = Path(os.path.realpath(path))
        except OSError as error:  # a link that was replaced while it was read
            raise _translated(error, path) from error
        for root in self._roots:
            base = Path(os.path.realpath(root))
            if resolved.is_relative_to(base):
                return str(base), resolved.relative_to(base).parts
        raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, f"{path} is not under an allowed directory")

    @staticmethod
    def _read_first(descriptor: int, path: str, *, size: int) -> bytes:
        _facts(descriptor, path)
        return os.read(descriptor, size)

    def _read(self, descriptor: int, path: str) -> bytes:
        facts = _facts(descriptor, path)
        chunks: list[bytes] = []
        # One byte more than allowed is asked for: a file can grow after fstat.
        left = self._max_bytes + 1
        if facts.st_size < left:
            while left > 0 and (chunk := os.read(descriptor, min(left, _CHUNK_BYTES))):
                chunks.append(chunk)
                left -= len(chunk)
            if left > 0:
                return b"".join(chunks)
        raise ImageRejectedError(RejectReason.TOO_LARGE_BYTES, f"{path} is over {self._max_bytes} bytes")


def local_path(uri: str) -> str:
    """Path that a `file:` URI or a plain path names.

    Raises:
        ImageRejectedError: another host's file, a relative URI, what no file can be called.
    """
    path = uri
    if uri.startswith("file:"):
        host, path = "", uri.removeprefix("file:")
        if path.startswith("//"):
            host, slash, rest = path[2:].partition("/")
            path = slash + rest
        if host not in {"", "localhost"}:
            raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, "a file: URI must name this host")
        if not _is_encodable(path):
            raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, "this names no file")
        path = os.fsdecode(unquote_to_bytes(os.fsencode(path)))
        if not path.startswith("/"):
            raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, "a file: URI must hold an absolute path")
    if not path or "\0" in path or not _is_encodable(path):
        raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, "this names no file")
    return path


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _open_under(root: str, parts: tuple[str, ...]) -> int:
    """Descriptor of the file that `parts` lead to, no component being a link."""
    if not parts:
        return os.open(root, _READ)
    here = os.open(root, _ENTER)
    for part in parts[:-1]:
        try:
            inner = os.open(part, _ENTER, dir_fd=here)
        finally:
            os.close(here)
        here = inner
    try:
        return os.open(parts[-1], _READ, dir_fd=here)
    finally:
        os.close(here)


def _facts(descriptor: int, path: str) -> os.stat_result:
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, f"{path} is not a regular file")
    return facts


def _walk(root: str, left_out: LeftOut | None) -> Iterator[str]:
    # A stack of our own: directories can be nested deeper than Python calls.
    pending = [iter(_entries(root))]
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
        elif left_out is not None and is_hidden(entry.name):
            left_out.pass_over(entry.path, "hidden")
        elif entry.is_dir(follow_symlinks=False):
            pending.append(iter(_entries_below(entry.path, left_out)))
        elif _may_be_file(entry):
            yield entry.path
        elif left_out is not None and Path(entry.path).is_dir():
            left_out.lose(entry.path, "a link to a directory, which is not followed", unreadable=False)
        elif left_out is not None and has_image_suffix(entry.name):
            yield entry.path  # a link to nothing, a pipe: `fetch` says what it is
        elif left_out is not None:
            left_out.pass_over(entry.path, "no regular file")


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise _translated(error, directory) from error


def _entries_below(directory: str, left_out: LeftOut | None) -> list[os.DirEntry[str]]:
    try:
        return _entries(directory)
    except (ImageRejectedError, TransientError) as error:
        if left_out is None:
            raise
        why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        left_out.lose(directory, f"cannot be listed: {why}", unreadable=True)
        return []


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        # A link whose target cannot be looked at: `fetch` says why, leaving it out would hide it.
        return True


def storable(path: str) -> str:
    """The path, or its URI where a name in it is not UTF-8 and no database takes it as text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).absolute().as_uri()
    return path


def _translated(error: OSError, path: str) -> CodeWorkerError:
    what = os.strerror(error.errno) if error.errno else type(error).__name__
    if (reason := _REASONS.get(error.errno or 0)) is not None:
        return ImageRejectedError(reason, f"{path}: {what}")
    return TransientError(RejectReason.FETCH_FAILED, f"{path}: {what}")
