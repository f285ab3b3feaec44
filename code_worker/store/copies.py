"""What files of SQLite say beside the store: which erasures a copy undoes, who is heard of, which copies lie about.

They are read as they are, of whatever revision: a table or column that one does not have holds nothing.
"""

from __future__ import annotations

import json
import shlex
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import make_url

from code_worker.store.erasures import IMAGE, JOB, TENANT, digest

__all__ = ["Undone", "aside_copies", "aside_of", "file_of", "heard_of", "may_hold", "read_only", "undone"]

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
    quoted = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(f"file:{quoted}?mode=ro", uri=True, timeout=timeout_s)


def heard_of(path: Path, within_s: float) -> list[str]:
    """Parts that said within so many seconds that they use this database: role, host and process.

    Raises:
        sqlite3.DatabaseError: it is no database.
    """
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
        known = {row[:2] for row in _rows(then, asked)}
        for key, at, scope, by, why, salt, target in _rows(now, asked):
            if (key, at) in known:
                continue
            digests = {one for (one,) in _rows(now, "SELECT digest FROM erased_digests WHERE erasure_id = ?", key)}
            named = json.loads(target or "null") or _named(then, scope, salt, digests)
            again = [_command(kind, value, why) for kind, values in named.items() for value in _listed(values)]
            yield Undone(str(UUID(key)), scope, f"{at[:19]} UTC", by, why, again)


def _named(copy: sqlite3.Connection, scope: str, salt: str, digests: Collection[str]) -> dict[str, Any]:
    """What of the copy the erasure named: a receipt holds digests alone, but the copy has the names."""
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
    """Where `db restore` leaves the database that it replaces at that moment; not used for other databases."""
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
        if not str(error).startswith(("no such table", "no such column")):
            raise
