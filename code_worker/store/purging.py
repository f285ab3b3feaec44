"""What a deleted row leaves behind in the database's files, and how it is overwritten."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from code_worker.errors import StoreUnavailableError
from code_worker.store.engine import Store
from code_worker.store.faults import classify, translate

__all__ = ["purge"]

_TABLES: Final = (
    "jobs, verdicts, labels, embeddings, shadow_scores, kept_images, imported_rows, dead_letters, snapshots, runs, "
    "erasures, erasure_targets, image_origins, copies_to_drop, image_groups, source_pauses"
)
_PATIENCE_S: Final = 60.0


def purge(store: Store) -> None:
    """Leaves nothing of deleted rows in the database's files, as far as the database can.

    SQLite: the file is rewritten without its free pages and the log cut to nothing; writers wait meanwhile, and it
    takes as much disk again as the database. PostgreSQL: the tables are vacuumed, so that their pages are used again,
    and analysed, so that the statistics of their columns hold no value that is gone. What a dead row left on a page
    goes when that is overwritten, or at once by `VACUUM FULL`, which is an operator's decision since it locks the
    tables.

    Raises:
        StoreUnavailableError: somebody kept reading an older state of the database; try again.
        StoreFullError: the disk is too full to rewrite the file.
    """
    try:
        if store.dialect == "postgresql":
            _vacuum(store)
        else:
            _rewrite(store)
    except SQLAlchemyError as error:
        raise translate(error, classify(error)) from error


def _vacuum(store: Store) -> None:
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if store.pooled:
            # The limit is set within our transactions alone, and what is set here another's connection would keep.
            connection.execute(text(f"VACUUM (ANALYZE) {_TABLES}"))
            return
        connection.execute(text("SET statement_timeout = 0"))
        try:
            connection.execute(text(f"VACUUM (ANALYZE) {_TABLES}"))
            # The connection goes back to the pool; its next user wants the limit again.
            connection.execute(text("RESET statement_timeout"))
        except BaseException:
            connection.invalidate()
            raise


def _rewrite(store: Store) -> None:
    """By a connection of its own: VACUUM must be in no transaction, and ours begin one by themselves."""
    assert store.engine.url.database is not None  # noqa: S101 - SQLite here always lives in a file
    with closing(sqlite3.connect(store.engine.url.database, timeout=_PATIENCE_S, isolation_level=None)) as connection:
        try:
            connection.execute("VACUUM")
            deadline = time.monotonic() + _PATIENCE_S
            # Whoever reads holds on to the log; a busy answer is no error.
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > deadline:
                    raise StoreUnavailableError(
                        "the database's log cannot be emptied: something has been reading from it for a minute; try "
                        "again, or stop what reads"
                    )
                time.sleep(0.2)
        except sqlite3.OperationalError as error:
            raise StoreUnavailableError(f"the database cannot be rewritten: {error}") from error
