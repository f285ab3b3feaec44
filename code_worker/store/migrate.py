"""Migrations: Alembic, run from the files that come with the package, under a lock; and what a health check asks."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, column, inspect, make_url, select, table, text
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.logs import get_logger
from code_worker.store.engine import Store, open_store
from code_worker.store.models import Base, db_now


def server_time(session: Session) -> datetime:
    """The database's own clock, by which leases are reckoned."""
    return session.execute(select(db_now())).scalar_one()


def place(url: str) -> str:
    """Returns where a database is, without user and password."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return f"SQLite at {parsed.database}"
    return f"PostgreSQL at {parsed.host or 'a local socket'}, database {parsed.database}"


def is_missing(url: str) -> bool:
    """Returns whether it is a file that is not there yet; opening the store would make an empty one."""
    parsed = make_url(url)
    return parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").expanduser().exists()


VERSION_TABLE: Final = "code_worker_version"
"""Where the database's revision stands: Alembic's own name for it is every application's."""
_SHARED_TABLE: Final = "alembic_version"
"""That name."""
_UNRELEASED: Final = ("2026_11_", "2026_12_01_job")
"""Beginnings of revisions from before the first release, whose migrations are gone."""
_log = get_logger(__name__)
_LOCK: Final = 0x636F6465_776F726B
"""Key of PostgreSQL's advisory lock: "codework"."""
_BEFORE: Final = (
    # The second process waits for the first to finish; after that, tables in use are waited for only briefly.
    "SET LOCAL lock_timeout = '60s'",
    "SET LOCAL statement_timeout = 0",
    f"SELECT pg_advisory_xact_lock({_LOCK})",
    "SET LOCAL lock_timeout = '5s'",
)


def upgrade(store: Store, to: str = "head", *, beside: bool = False) -> str | None:
    """Brings the database to a revision, in one transaction; returns the revision it had before.

    One that is newer than this code is left as it is: migrations first only expand, so it serves.

    Args:
        store: The database.
        to: The revision, or `head`.
        beside: Make our tables in a database that another application migrates with Alembic too.

    Raises:
        StoreError: the database refused, is away, or is another application's; nothing was changed.
    """

    def work(session: Session) -> str | None:
        connection = session.connection()
        _take_lock(connection)
        before = _revision(connection)
        _refuse_unreleased(before)
        if is_newer(before):
            return before
        if before is None:
            _refuse_foreign(connection, beside=beside)
        command.upgrade(_config(connection), to)
        return before

    before = store.run(work)
    if (now := current(store)) != before:
        _log.info("database_migrated", before=before, now=now)
    return before


def downgrade(store: Store, to: str) -> None:
    """Takes the database back to an older revision (`base`: no tables), data of newer tables included.

    Raises:
        StoreError: the database refused, is away, or is newer than this code; nothing was changed.
    """

    def work(session: Session) -> None:
        connection = session.connection()
        _take_lock(connection)
        before = _revision(connection)
        _refuse_unreleased(before)
        if is_newer(before):
            raise StoreError(
                f"revision {before} is unknown to this version: take it back with the version that made it"
            )
        command.downgrade(_config(connection), to)

    store.run(work)


def script(url: str) -> str:
    """The SQL that `upgrade` would run on an empty database, for those who may not let a program change theirs."""
    written = io.StringIO()
    config = _config(None)
    config.output_buffer = written
    config.attributes["url"] = url
    command.upgrade(config, "head", sql=True)
    return written.getvalue()


def current(store: Store) -> str | None:
    """The database's revision; None before the first migration."""
    return store.run(lambda session: _revision(session.connection()), write=False)


def head() -> str:
    """The revision that this version of the code needs."""
    newest = _scripts().get_current_head()
    if newest is None:
        raise StoreError("no migrations came with this installation")
    return newest


def is_newer(revision: str | None) -> bool:
    """Returns whether a revision of a database is one that a later version of the code made."""
    return revision is not None and revision not in _known() and not is_unreleased(revision)


def is_unreleased(revision: str | None) -> bool:
    """Returns whether a version from before the first release made a revision: no version can upgrade it."""
    return revision is not None and revision.startswith(_UNRELEASED)


def require_current(store: Store) -> None:
    """Returns when the database fits this code. One that is newer fits too: migrations first only expand.

    Raises:
        StoreError: it is empty, older, or another application's.
    """
    have, need = current(store), head()
    if have == need:
        return
    _refuse_unreleased(have)
    if is_newer(have):
        _log.warning("database_is_newer", revision=have, known=need)
        return
    if have is None:
        store.run(lambda session: _refuse_foreign(session.connection(), beside=False), write=False)
    state = "has no tables yet" if have is None else f"is at revision {have} and this version needs {need}"
    raise StoreError(f"the database {state}: run `code-worker db upgrade`")


def open_current(url: str, *, threads: int = 8) -> Store:
    """Opens a database that fits this code; of one that does not, no connection stays open.

    Raises:
        ConfigurationError: see `open_store`.
        StoreError: it is away, not there, empty or older; nothing is made.
    """
    store = open_store(url, threads=threads, create=False)
    try:
        require_current(store)
    except BaseException:
        store.close()
        raise
    return store


def _take_lock(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        for statement in _BEFORE:
            connection.execute(text(statement))


def _revision(connection: Connection) -> str | None:
    rows = _rows(connection, VERSION_TABLE)
    if rows is None and _tables(connection) & set(Base.metadata.tables):
        # The first versions kept theirs in Alembic's own table. Tables of our names must be there too, since
        # another application may name its revisions by date as well.
        rows = [one for one in _rows(connection, _SHARED_TABLE) or [] if is_unreleased(one)]
    return next(iter(rows or []), None)


def _refuse_unreleased(revision: str | None) -> None:
    if is_unreleased(revision):
        raise StoreError(
            f"the database is at revision {revision}, of a version before the first release, and cannot be upgraded: "
            "name a new one in CODE_WORKER_DATABASE_URL, or move the old file away, and run `code-worker db upgrade`"
        )


def _rows(connection: Connection, name: str) -> list[str] | None:
    """Revisions that a version table holds; None where there is no such table."""
    if not inspect(connection).has_table(name):
        return None
    return list(connection.scalars(select(column("version_num")).select_from(table(name))))


def _tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


def _refuse_foreign(connection: Connection, *, beside: bool) -> None:
    """Looks, before our first table is made, whether the database is somebody else's.

    Raises:
        StoreError: it has tables of our names, or another application migrates it and nobody said that this is meant.
    """
    if _rows(connection, VERSION_TABLE) is not None:
        return
    if taken := sorted(_tables(connection) & set(Base.metadata.tables)):
        raise StoreError(
            f"another application's database: it has tables {', '.join(taken)} that code_worker did not make; "
            "name a database or a schema of code_worker's own in CODE_WORKER_DATABASE_URL"
        )
    shared = _rows(connection, _SHARED_TABLE)
    if shared and not beside:
        raise StoreError(
            f"another application's database: its {_SHARED_TABLE} is at {', '.join(shared)}; name code_worker's own "
            "in CODE_WORKER_DATABASE_URL, or run `code-worker db upgrade --beside` to make its tables in this one"
        )


def _known() -> frozenset[str]:
    return frozenset(revision.revision for revision in _scripts().walk_revisions())


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config(None))


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("file_template", "%%(year)d_%%(month).2d_%%(day).2d-%%(slug)s")
    config.attributes["connection"] = connection
    return config


def _directory() -> Path:
    """In a wheel the migrations lie inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parent.parent
    for directory in (package / "_migrations", package.parent / "migrations"):
        if (directory / "env.py").is_file():
            return directory
    raise StoreError("no migrations came with this installation")
