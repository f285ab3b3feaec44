"""A copy of a SQLite database while it is in use, and the way back; PostgreSQL has tools of its own."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from code_worker.disk import whole_file
from code_worker.errors import ConfigurationError, StoreError, StoreUnavailableError
from code_worker.store.copies import file_of, heard_of, read_only
from code_worker.store.migrate import SHARED_TABLE, VERSION_TABLE

__all__ = ["backup", "restore"]

_PATIENCE_S: Final = 60.0
_LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


class _NotOursError(StoreError):
    """A file that is no database, or somebody else's."""


def backup(url: str, target: Path) -> int:
    """Writes a copy of the database of one moment, whole or not at all, and returns its size in bytes.

    Readers and writers go on meanwhile. The copy is one file, readable by its owner alone, and checked.

    Raises:
        ConfigurationError: the database is none of SQLite's, or the file is there already.
        StoreError: the copy does not hold together, or there is nothing to copy.
        StoreUnavailableError: it cannot be written.
    """
    source = _file_of(url, "pg_dump --format=custom")
    if not source.is_file():
        raise StoreError(f"no database at {source}: there is nothing to copy")
    if target.exists():
        raise ConfigurationError(f"{target} is there already: name another file")
    with _translated(f"the database cannot be copied to {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target, private=True) as partial:
            _copy(source, partial)
            _check(partial)
    return target.stat().st_size


def restore(url: str, source: Path, aside: Path, *, silence_s: float | None = None) -> None:
    """Makes the database what it was when the copy was taken, in one transaction; the present one is copied aside.

    Processes that have it open see the older state from then on; still, stop them: what they hold is of another time.

    Args:
        url: of the database.
        source: the copy.
        aside: where the present database is copied to.
        silence_s: a part counts as stopped when nothing was heard of it for so long; None: do not ask.

    Raises:
        ConfigurationError: the database is none of SQLite's, or the file is no regular one, the database itself, or
            no database of ours.
        StoreError: the file is damaged, or parts are running; nothing was changed.
        StoreUnavailableError: something writes to the database all the time, or the disk is full.
    """
    target = _file_of(url, "pg_restore")
    _refuse_source(source, target)
    with _translated(f"{source} cannot be restored"):
        try:
            _check(source)
        except _NotOursError as error:
            raise ConfigurationError(f"{error}: name a copy that `code-worker db backup` wrote") from error
        if target.is_file() and target.stat().st_size:
            if silence_s is not None:
                _refuse_running(target, silence_s)
            backup(url, aside)
        _copy(source, target, keep_log=True)


def _refuse_running(target: Path, silence_s: float) -> None:
    if parts := heard_of(target, silence_s):
        raise StoreError(
            f"in use by {', '.join(parts)}: stop them first, or say --force where they died "
            f"(one that died counts as gone after {silence_s:g} s)"
        )


def _refuse_source(source: Path, target: Path) -> None:
    if not source.exists():
        raise ConfigurationError(f"{source}: no such file")
    if not source.is_file():
        raise ConfigurationError(f"{source} is no regular file: name a copy that `code-worker db backup` wrote")
    if target.exists() and source.samefile(target):
        raise ConfigurationError(f"{source} is the database itself: name a copy that `code-worker db backup` wrote")


def _file_of(url: str, instead: str) -> Path:
    if (file := file_of(url)) is None:
        raise ConfigurationError(f"this is for SQLite; for PostgreSQL use {instead} (docs/operations.md)")
    return file


def _copy(source: Path, target: Path, *, keep_log: bool = False) -> None:
    """By SQLite's own backup, in one step: a read transaction, which in WAL mode holds up no writer."""
    reader = read_only(source, timeout_s=_PATIENCE_S)
    writer = sqlite3.connect(target, timeout=_PATIENCE_S)
    with closing(reader), closing(writer):
        reader.backup(writer, progress=_give_up_after(_PATIENCE_S))
        # One file that can be carried away, or what every process of ours expects to find.
        writer.execute(f"PRAGMA journal_mode = {'WAL' if keep_log else 'DELETE'}")


def _give_up_after(seconds: float) -> Callable[[int, int, int], None]:
    """What SQLite's backup asks after each try; by itself it tries a locked database for ever."""
    deadline = time.monotonic() + seconds

    def look(status: int, _remaining: int, _total: int) -> None:
        if status in _LOCKED and time.monotonic() > deadline:
            raise sqlite3.OperationalError(
                f"somebody has been writing to it for {seconds:g} s: stop workers, trainer and beat"
            )

    return look


def _check(path: Path) -> None:
    with closing(read_only(path)) as connection:
        try:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            revision = _revision(connection)
        except sqlite3.DatabaseError as error:
            # SQLITE_ERROR: another database, without our tables. What is damaged has codes of its own.
            if error.sqlite_errorcode in {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}:
                raise _NotOursError(f"{path} is no database of code_worker: {error}") from error
            raise StoreError(f"{path} cannot be read as a whole: {error}") from error
    if found != "ok":
        raise StoreError(f"{path} does not hold together: {found}")
    if revision is None:
        raise _NotOursError(f"{path} is no database of code_worker: it has no revision")


def _revision(connection: sqlite3.Connection) -> object:
    """A row of the version table, or of the one in which earlier versions kept it."""
    try:
        return connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()  # noqa: S608 - a constant
    except sqlite3.OperationalError:
        return connection.execute(f"SELECT version_num FROM {SHARED_TABLE}").fetchone()  # noqa: S608 - a constant


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Its text would name the file that was written beside the one that somebody asked for.
        raise StoreUnavailableError(f"{doing}: {error.strerror or error}") from error
    except sqlite3.DatabaseError as error:
        raise StoreUnavailableError(f"{doing}: {error}") from error
