"""A copy of a SQLite database while it is in use, the way back, and what copies say beside the store."""

from __future__ import annotations

import json
import shlex
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import make_url

from code_worker.errors import ConfigurationError, StoreError, StoreUnavailableError
from code_worker.store.erasure.receipts import IMAGE, JOB, TENANT, digest
from code_worker.store.migrate import VERSION_TABLE
from code_worker.system.files import whole_file

_ASIDE: Final = ".before-"
_BEFORE: Final = "before "
_OPTIONS: Final = {JOB: "--job", IMAGE: "--sha256", "sha256": "--sha256", TENANT: "--tenant"}
_IMAGES: Final = ("verdicts", "labels", "embeddings", "kept_images")


@dataclass(frozen=True, slots=True)
class Undone:
    """An erasure that the database has and a copy does not.

    Attributes:
        again: commands that ask for it once more; none where the copy holds nothing that it erased.
    """

    id: str
    scope: str
    at: str
    by: str
    why: str
    again: list[str]


def file_of(url: str) -> Path | None:
    """The database's file; None where it is none of SQLite's."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database is None:
        return None
    return Path(parsed.database).expanduser().absolute()


def read_only(path: Path, *, timeout_s: float = 5.0) -> sqlite3.Connection:
    """Opens a database that is there, to read it; somebody else's lock is waited for so long."""
    # In a URI `?` and `#` would end the path. `mode=ro` never
    # makes a file where there is none, as a plain open would.
    quoted = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(f"file:{quoted}?mode=ro", uri=True, timeout=timeout_s)


def heard_of(path: Path, within_s: float) -> list[str]:
    """Parts that said within so many seconds that they use this database: role, host and process.

    Raises:
        sqlite3.DatabaseError: it is no database.
    """
    # Times as text of three digits beside the six that are
    # stored: compared as text, the shorter of equal ones is less.
    statement = (
        "SELECT host, pid, info FROM workers "
        "WHERE seen_at > strftime('%Y-%m-%d %H:%M:%f', 'now', ?) ORDER BY started_at"
    )
    with closing(read_only(path)) as connection:
        rows = list(_rows(connection, statement, f"-{within_s} seconds"))
    return [f"{json.loads(info).get('role', 'worker')} {host}:{pid}" for host, pid, info in rows]


def undone(present: Path, copy: Path) -> Iterator[Undone]:
    """Erasures that were asked for, or asked for again, after the copy was made; the oldest first.

    What each of them named is looked for among the jobs, tenants and images of the copy, by one digest each with the
    receipt's salt: some 20 seconds per million rows and erasure.

    Raises:
        sqlite3.DatabaseError: one of them is no database.
    """
    asked = "SELECT id, created_at, scope, by, why, salt, target FROM erasures ORDER BY created_at"
    with closing(read_only(present)) as now, closing(read_only(copy)) as then:
        # With the time, since an erasure that was asked for again
        # has a new one: the copy lacks what came into it then.
        known = {row[:2] for row in _rows(then, asked)}
        for key, at, scope, by, why, salt, target in _rows(now, asked):
            if (key, at) in known:
                continue
            digests = {one for (one,) in _rows(now, "SELECT digest FROM erased_digests WHERE erasure_id = ?", key)}
            named = json.loads(target or "null") or _named(then, scope, salt, digests)
            again = [_command(kind, value, why) for kind, values in named.items() for value in _listed(values)]
            yield Undone(str(UUID(key)), scope, f"{at[:19]} UTC", by, why, again)


def _named(copy: sqlite3.Connection, scope: str, salt: str, digests: Collection[str]) -> dict[str, Any]:
    """Returns what of the copy the erasure named: a receipt holds digests alone, but the copy has the names."""
    if scope.startswith(_BEFORE):
        return {"before": scope.removeprefix(_BEFORE)}
    for kind, values in ((JOB, _jobs(copy)), (TENANT, _tenants(copy))):
        if scope == kind and (found := next((one for one in values if digest(salt, kind, one) in digests), None)):
            return {kind: found}
    # Of a job that the copy does not have it may have the image.
    return {IMAGE: sorted(one for one in set(_images(copy)) if digest(salt, IMAGE, one) in digests)}


def _jobs(connection: sqlite3.Connection) -> Iterator[str]:
    return (str(UUID(one)) for (one,) in _rows(connection, "SELECT id FROM jobs"))


def _tenants(connection: sqlite3.Connection) -> Iterator[str]:
    return (one for (one,) in _rows(connection, "SELECT DISTINCT tenant FROM jobs WHERE tenant IS NOT NULL"))


def _images(connection: sqlite3.Connection) -> Iterator[str]:
    for table in _IMAGES:
        statement = f"SELECT DISTINCT sha256 FROM {table} WHERE sha256 IS NOT NULL"  # noqa: S608 - a constant
        yield from (one for (one,) in _rows(connection, statement))


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _command(kind: str, value: str, why: str) -> str:
    reason = f" --why {shlex.quote(why)}" if why else ""
    return f"code-worker erase {_OPTIONS.get(kind, '--before')} {shlex.quote(value)}{reason}"


def aside_of(url: str, at: datetime) -> Path:
    """Returns where `db restore` leaves the database that it replaces at that moment.

    Not used for other databases.
    """
    file = file_of(url) or Path("none")
    return file.with_name(f"{file.name}{_ASIDE}{at:%Y%m%dT%H%M%S%f}")


def aside_copies(url: str) -> list[Path]:
    """Copies that `db restore` left beside the database, the oldest first."""
    if (file := file_of(url)) is None or not file.parent.is_dir():
        return []
    return sorted(
        one for one in file.parent.iterdir() if one.name.startswith(f"{file.name}{_ASIDE}") and one.is_file()
    )


def may_hold(url: str, erasure_id: str) -> list[Path]:
    """Those of these copies that were made before an erasure was done, and may hold what it erased."""
    return [one for one in aside_copies(url) if not _is_done(one, erasure_id)]


def _is_done(copy: Path, erasure_id: str) -> bool:
    statement = "SELECT state FROM erasures WHERE id = ?"
    try:
        with closing(read_only(copy)) as connection:
            return [state for (state,) in _rows(connection, statement, UUID(erasure_id).hex)] == ["done"]
    except sqlite3.DatabaseError:
        return False  # who may not read it cannot say what it holds


def _rows(connection: sqlite3.Connection, statement: str, *values: object) -> Iterator[tuple[Any, ...]]:
    try:
        yield from connection.execute(statement, values)
    except sqlite3.OperationalError as error:
        # The file may be of an older revision, which lacks the
        # table; what it cannot hold was not lost from it either.
        if not str(error).startswith(("no such table", "no such column")):
            raise


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
            # Checked before it gets its name: a copy that does not hold together never looks like one.
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
            # The present one is safe before a page of it changes: who dies between these two has lost nothing.
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
    """Returns what SQLite's backup asks after each try; by itself it tries a locked database for ever."""
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
            # One finding is enough to refuse the file; without the number a hundred are looked for.
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
    """A row of the version table."""
    return connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()  # noqa: S608 - a constant


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Its text would name the file that was written beside the one that somebody asked for.
        raise StoreUnavailableError(f"{doing}: {error.strerror or error}") from error
    except sqlite3.DatabaseError as error:
        raise StoreUnavailableError(f"{doing}: {error}") from error
