"""Migrations: Alembic, run from the files that come with the package, under a lock."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.logs import get_logger
from code_worker.store.engine import Store, open_store

__all__ = ["current", "downgrade", "head", "open_current", "require_current", "script", "upgrade"]

_log = get_logger(__name__)
_LOCK: Final = 0x636F6465_776F726B
"""Key of PostgreSQL's advisory lock: "codework"."""
_BEFORE: Final = (
    # Whoever comes second waits for the first to finish; after that, tables in use are waited for only briefly.
    "SET LOCAL lock_timeout = '60s'",
    "SET LOCAL statement_timeout = 0",
    f"SELECT pg_advisory_xact_lock({_LOCK})",
    "SET LOCAL lock_timeout = '5s'",
)


def upgrade(store: Store, to: str = "head") -> str | None:
    """Brings the database to a revision, in one transaction; returns the revision it had before.

    Raises:
        StoreError: the database refused or is away; nothing was changed.
    """

    def work(session: Session) -> str | None:
        connection = session.connection()
        _take_lock(connection)
        before = _revision(connection)
        command.upgrade(_config(connection), to)
        return before

    before = store.run(work)
    if (now := current(store)) != before:
        _log.info("database_migrated", before=before, now=now)
    return before


def downgrade(store: Store, to: str) -> None:
    """Takes the database back to an older revision (`base`: no tables), data of newer tables included.

    Raises:
        StoreError: the database refused or is away; nothing was changed.
    """

    def work(session: Session) -> None:
        _take_lock(session.connection())
        command.downgrade(_config(session.connection()), to)

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


def require_current(store: Store) -> None:
    """Returns when the database fits this code. One that is newer fits too: migrations first only expand.

    Raises:
        StoreError: it is empty or older.
    """
    have, need = current(store), head()
    if have == need:
        return
    if have is not None and have not in {revision.revision for revision in _scripts().walk_revisions()}:
        _log.warning("database_is_newer", revision=have, known=need)
        return
    state = "has no tables yet" if have is None else f"is at revision {have} and this version needs {need}"
    raise StoreError(f"the database {state}: run `code-worker db upgrade`")


def open_current(url: str, *, threads: int = 8) -> Store:
    """Opens a database that fits this code; of one that does not, no connection stays open.

    Raises:
        ConfigurationError: see `open_store`.
        StoreError: it is away, empty or older.
    """
    store = open_store(url, threads=threads)
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
    return MigrationContext.configure(connection).get_current_revision()


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
