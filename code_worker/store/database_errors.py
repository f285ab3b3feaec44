"""Classifies database errors: try the transaction again, wait, give up, or report a broken rule."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from sqlalchemy.exc import DBAPIError, DisconnectionError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from code_worker.errors import (
    CommitUnknownError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreUnavailableError,
)
from code_worker.logs import redact

_POOLER_STATES: Final = frozenset({"26000", "42P05"})
"""A prepared statement that is not there, or is there already: the connection is another one than a moment ago."""
_POOLER_HINT: Final = "a pooler in transaction mode is in between: set CODE_WORKER_DATABASE_POOLER=transaction"


class DbFault(Enum):
    """The dispositions of a database error."""

    RETRY = auto()
    """Passes by itself: the whole transaction again, at once."""
    UNAVAILABLE = auto()
    """Lasts longer than a retry: callers that can wait do, as for a database that is away."""
    FULL = auto()
    REFUSED = auto()
    """A rule is broken; the same row is refused again."""
    UNSTORABLE = auto()
    """A value that the database cannot hold; the same one again fails again."""
    FORBIDDEN = auto()
    """The database's user lacks a right: an operator must act, and no row is to blame."""
    UNMIGRATED = auto()
    BUG = auto()


def _rows(table: Mapping[DbFault, str]) -> dict[str, DbFault]:
    return {state: fault for fault, states in table.items() for state in states.split()}


SQLSTATES: Final = _rows(
    {
        # 26000 and 42P05: a statement prepared on another connection, behind a pooler or after a failover.
        # 40001 and 40P01 are a lost race and a deadlock; 55P03 is our own lock_timeout.
        # 57014, which our statement_timeout raises, is not among them (class 57 below):
        # the same statement would most likely run into the limit again.
        DbFault.RETRY: "08 40 72 25P03 26 42P05 53300 55P03 57P01 57P02 57P03 57P05",
        # 25006: a standby, or a primary that was made one; XX: the server's own faults, damaged files among them.
        DbFault.UNAVAILABLE: "25006 25P04 28 3D 53 55 57 58 F0 XX",
        DbFault.FULL: "53100",
        # P0001 and 44: triggers and views that somebody added.
        DbFault.REFUSED: "23 27 44 P0001",
        DbFault.UNSTORABLE: "22 54",
        DbFault.FORBIDDEN: "0L 0P 42501",
        DbFault.UNMIGRATED: "3F 42P01 42703",
        DbFault.BUG: "02 03 09 0A 0B 0F 0Z 10 20 21 24 25 2B 2D 2F 34 38 39 3B 42 HV P0",
    }
)
"""SQLSTATE, or the two characters of its class, → what it means; the whole state has precedence."""

_SQLITE_CODES: Final = {
    code: fault
    for fault, codes in {
        DbFault.RETRY: (
            *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL),
            *(sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_ABORT),
        ),
        DbFault.UNAVAILABLE: (
            *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOTADB),
            *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT),
        ),
        DbFault.FULL: (sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOLFS),
        DbFault.REFUSED: (sqlite3.SQLITE_CONSTRAINT,),
        DbFault.UNSTORABLE: (sqlite3.SQLITE_TOOBIG,),
        DbFault.FORBIDDEN: (sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH),
    }.items()
    for code in codes
}


def classify(error: SQLAlchemyError) -> DbFault:
    """Decides by SQLSTATE or SQLite's result code; an error without either means the connection is gone."""
    if isinstance(error, PoolTimeoutError | DisconnectionError):
        return DbFault.RETRY
    if not isinstance(error, DBAPIError):
        return DbFault.BUG
    if isinstance(error.orig, sqlite3.Error):
        return _classify_sqlite(error, error.orig)
    return _classify_postgresql(error)


def _classify_sqlite(error: DBAPIError, orig: sqlite3.Error) -> DbFault:
    # Extended codes, such as that of a busy snapshot or of a failed fsync, hold the primary code in their low byte.
    code = getattr(orig, "sqlite_errorcode", 0) & 0xFF
    if (fault := _SQLITE_CODES.get(code)) is not None:
        return fault
    text = str(orig)
    # SQLITE_ERROR is the code of wrong SQL as well: the text alone tells a missing migration from a bug of ours.
    if code == sqlite3.SQLITE_ERROR and ("no such table" in text or "no such column" in text):
        return DbFault.UNMIGRATED
    return DbFault.REFUSED if isinstance(error, IntegrityError) else DbFault.BUG


def _classify_postgresql(error: DBAPIError) -> DbFault:
    state = getattr(error.orig, "sqlstate", None) or ""
    fault = SQLSTATES.get(state) or SQLSTATES.get(state[:2])
    if fault is not None and fault is not DbFault.BUG:
        return fault
    if loses_connection(error):
        return DbFault.RETRY
    # The driver's own refusals have no state: a NUL in a text, for one.
    return DbFault.UNSTORABLE if not state and type(error).__name__ == "DataError" else DbFault.BUG


def loses_connection(error: SQLAlchemyError) -> bool:
    """Returns whether it leaves open what the server did with the statement.

    No answer came, or that of a server that ends.

    A server that is told to end may have committed before it says so (57P01 while it waits for a replica).
    """
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error.orig, sqlite3.Error):
        # A write or fsync that failed during COMMIT: whether the record of it reached the log is not known.
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        return error.connection_invalidated or type(error).__name__ in {"OperationalError", "InterfaceError"}
    return error.connection_invalidated or state.startswith(("08", "57P")) or state == "40003"


def is_read_only(error: SQLAlchemyError) -> bool:
    """Returns whether this connection's server only reads.

    After a failover a new connection may reach one that writes.
    """
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "25006"


_ERRORS: Final[Mapping[DbFault, tuple[type[StoreError], str]]] = {
    DbFault.FULL: (StoreFullError, "storage_full: the database's disk is full ({}); free space, nothing is lost"),
    DbFault.RETRY: (StoreUnavailableError, "the database does not answer: {}"),
    DbFault.UNAVAILABLE: (StoreUnavailableError, "the database does not work at present: {}"),
    DbFault.REFUSED: (StoreRefusedError, "the database refused: {}"),
    DbFault.UNSTORABLE: (StoreRefusedError, "the database cannot store this: {}"),
    DbFault.FORBIDDEN: (StoreError, "the database's user may not do this ({}): grant it the right"),
    DbFault.UNMIGRATED: (StoreError, "the database lacks a table or column ({}): run `code-worker db upgrade`"),
}


def _meets_pooler(error: SQLAlchemyError) -> bool:
    """Returns whether a pooler is in between that the settings do not name.

    It knows few parameters of a connection.
    """
    cause = getattr(error, "orig", None)
    return getattr(cause, "sqlstate", None) in _POOLER_STATES or "unsupported startup parameter" in str(cause)


def translate(error: SQLAlchemyError, fault: DbFault) -> Exception:
    """Our error for theirs; a bug of ours keeps its own type. No statement or parameter is quoted."""
    if fault is DbFault.BUG:
        return error
    if _meets_pooler(error):
        return StoreUnavailableError(f"the database cannot be used as it is: {_first_line(error)}; {_POOLER_HINT}")
    kind, text = _ERRORS[fault]
    return kind(text.format(_first_line(error)))


def commit_unknown(error: SQLAlchemyError) -> CommitUnknownError:
    """Our error for a transaction whose commit was sent and not answered; `error` is what the last try met."""
    return CommitUnknownError(
        f"the answer to a commit was lost ({_first_line(error)}): all of it was written, or nothing; repeating the "
        "same call is safe where it names a key or an id, and tells"
    )


def _first_line(error: SQLAlchemyError) -> str:
    return redact(str(getattr(error, "orig", None) or error)).strip().partition("\n")[0]
