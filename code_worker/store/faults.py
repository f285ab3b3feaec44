"""What a database error means: try the transaction again, give up, or report a broken rule."""

from __future__ import annotations

import sqlite3
from enum import Enum, auto

from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from code_worker.errors import StoreError, StoreFullError, StoreUnavailableError
from code_worker.logs import redact

__all__ = ["DbFault", "classify", "translate"]

_RETRYABLE_STATES = {"40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03"}
_FULL_STATES = {"53100"}
_MISSING_STATES = {"42P01", "42703"}
_SQLITE_RETRYABLE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


class DbFault(Enum):
    """What to do about a database error."""

    RETRY = auto()
    UNAVAILABLE = auto()
    FULL = auto()
    REFUSED = auto()
    UNMIGRATED = auto()
    BUG = auto()


def classify(error: SQLAlchemyError) -> DbFault:
    """Decides by SQLSTATE or SQLite's result code; an error without either means the connection is gone."""
    if isinstance(error, PoolTimeoutError):
        return DbFault.RETRY
    if not isinstance(error, DBAPIError):
        return DbFault.BUG
    if isinstance(error.orig, sqlite3.Error):
        return _classify_sqlite(error, error.orig)
    return _classify_postgresql(error)


def _classify_sqlite(error: DBAPIError, orig: sqlite3.Error) -> DbFault:
    code = getattr(orig, "sqlite_errorcode", 0) & 0xFF
    if code in _SQLITE_RETRYABLE:
        return DbFault.RETRY
    if code == sqlite3.SQLITE_FULL:
        return DbFault.FULL
    if isinstance(error, IntegrityError):
        return DbFault.REFUSED
    text = str(orig)
    if code == sqlite3.SQLITE_ERROR and ("no such table" in text or "no such column" in text):
        return DbFault.UNMIGRATED
    if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOTADB}:
        return DbFault.UNAVAILABLE
    return DbFault.BUG


def _classify_postgresql(error: DBAPIError) -> DbFault:
    state = getattr(error.orig, "sqlstate", None)
    if state in _FULL_STATES:
        return DbFault.FULL
    if state in _MISSING_STATES:
        return DbFault.UNMIGRATED
    if isinstance(error, IntegrityError):
        return DbFault.REFUSED
    if error.connection_invalidated or state in _RETRYABLE_STATES or (state or "").startswith("08"):
        return DbFault.RETRY
    if state is None and type(error).__name__ in {"OperationalError", "InterfaceError"}:
        return DbFault.RETRY
    return DbFault.UNAVAILABLE if (state or "").startswith(("28", "3D", "53", "57", "58")) else DbFault.BUG


def translate(error: SQLAlchemyError, fault: DbFault) -> Exception:
    """Our error for theirs; a bug of ours keeps its own type. No statement or parameter is quoted."""
    text = redact(str(getattr(error, "orig", None) or error)).strip()
    first = text.partition("\n")[0]
    if fault is DbFault.FULL:
        return StoreFullError(f"storage_full: the database's disk is full ({first}); free space, nothing is lost")
    if fault in {DbFault.RETRY, DbFault.UNAVAILABLE}:
        return StoreUnavailableError(f"the database does not answer: {first}")
    if fault is DbFault.REFUSED:
        return StoreError(f"the database refused: {first}")
    if fault is DbFault.UNMIGRATED:
        return StoreError(f"the database lacks a table or column ({first}): run `code-worker db upgrade`")
    return error
