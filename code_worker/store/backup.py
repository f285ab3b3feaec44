"""A copy of a SQLite database while it is in use, and the way back; PostgreSQL has tools of its own."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import make_url

from code_worker.disk import flush
from code_worker.errors import ConfigurationError, StoreError, StoreUnavailableError
from code_worker.store.migrate import SHARED_TABLE, VERSION_TABLE

__all__ = ["backup", "restore"]

_PATIENCE_S: Final = 60.0
_LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


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
        # mkstemp makes the file private, and the rename keeps it so.
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            _copy(source, partial)
            _check(partial)
            flush(partial)
            partial.rename(target)
            flush(target.parent)
        finally:
            partial.unlink(missing_ok=True)
    return target.stat().st_size


def restore(url: str, source: Path, aside: Path) -> None:
    """Makes the database what it was when the copy was taken, in one transaction; the present one is copied aside.

    Processes that have it open see the older state from then on; still, stop them: what they hold is of another time.

    Raises:
        ConfigurationError: as `backup`.
        StoreError: the file is no whole database of ours.
        StoreUnavailableError: something writes to the database all the time, or the disk is full.
    """
    target = _file_of(url, "pg_restore")
    if not source.is_file():
        raise ConfigurationError(f"{source}: no such file")
    with _translated(f"{source} cannot be restored"):
        _check(source)
        if target.is_file() and target.stat().st_size:
            backup(url, aside)
        _copy(source, target, keep_log=True)


def _file_of(url: str, instead: str) -> Path:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database is None:
        raise ConfigurationError(f"this is for SQLite; for PostgreSQL use {instead} (docs/operations.md)")
    return Path(parsed.database).expanduser().absolute()


def _copy(source: Path, target: Path, *, keep_log: bool = False) -> None:
    """By SQLite's own backup, in one step: a read transaction, which in WAL mode holds up no writer."""
    reader = sqlite3.connect(f"file:{_quoted(source)}?mode=ro", uri=True, timeout=_PATIENCE_S)
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


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _check(path: Path) -> None:
    with closing(sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)) as connection:
        try:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            revision = _revision(connection)
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{path} is no database of code_worker: {error}") from error
    if found != "ok" or revision is None:
        raise StoreError(f"{path} does not hold together: {found}")


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
    except (OSError, sqlite3.OperationalError) as error:
        raise StoreUnavailableError(f"{doing}: {error}") from error
