"""Connections and the unit of work: SQLite or PostgreSQL, whole transactions retried."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from code_worker.errors import ConfigurationError, StoreError
from code_worker.logs import get_logger
from code_worker.store.database_errors import (
    DbFault,
    classify,
    commit_unknown,
    is_read_only,
    loses_connection,
    translate,
)
from code_worker.store.ids import NEW_ID, uuid7
from code_worker.system.files import make_private
from code_worker.system.machine import ServerClock, jittered

__all__ = ["MAX_TRIES", "POOLER", "TRANSACTION", "Session", "Store", "open_store"]
T = TypeVar("T")

MAX_TRIES: Final = 5
_FIRST_WAIT_S: Final = 0.05
_BEGIN: Final = "code_worker_begin"
_PREPARE: Final = "prepare_threshold"
_OPTION: Final = re.compile(r"(?:-c\s*|--)([\w.-]+)=((?:\\.|[^\s\\])*)")
POOLER: Final = "pooler"
TRANSACTION: Final = "transaction"
"""`pooler=transaction` in a URL: what is behind it gives each transaction another connection."""
_SQLITE_PRAGMAS: Final = (
    "PRAGMA journal_mode = WAL",
    # A writer that finds the lock taken waits for so long before it is told so; the default is an error at once.
    "PRAGMA busy_timeout = 30000",
    # In WAL mode a loss of power may take the last commits, and
    # never damages the file; a killed process loses nothing.
    "PRAGMA synchronous = NORMAL",
    # Off by default, and per connection.
    "PRAGMA foreign_keys = ON",
)
_SESSION: Final = {
    "timezone": "UTC",
    # Longer than lock_timeout: who waits for a lock is told so (55P03, tried again) and not cancelled (57014).
    "statement_timeout": "15000",
    "lock_timeout": "5000",
    # A process that was stopped, or whose machine stands still, lets go of its row locks after this.
    "idle_in_transaction_session_timeout": "30000",
}

_JSON: Final = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))

_log = get_logger(__name__)


class Store:
    """One database; safe to share between threads, not across a fork.

    `pooled`: a pooler gives each transaction another connection, on which nothing may be left.
    """

    def __init__(self, engine: Engine, *, url: URL | None = None, pooled: bool = False) -> None:
        self.engine = engine
        self._url = url or engine.url
        self.dialect = engine.dialect.name
        self.pooled = pooled
        # Takes SQLite's write lock at once. One that began by reading and writes later is refused without any wait if
        # somebody wrote in between (a busy snapshot). PostgreSQL never sees this option.
        self._writer = engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})
        # SQLite takes and gives back its read lock for free; on PostgreSQL BEGIN and COMMIT are two journeys more.
        # Behind a pooler a statement without a transaction would have none of our limits.
        lone = {} if self.dialect == "sqlite" or pooled else {"isolation_level": "AUTOCOMMIT"}
        self._looker = engine.execution_options(**lone)
        self._clock = ServerClock()
        if self.dialect == "postgresql":
            event.listen(engine, "connect", self._read_clock)

    @property
    def url(self) -> str:
        """Returns where it is, as `open_store` was told, password included: never log it."""
        return self._url.render_as_string(hide_password=False)

    @property
    def connections(self) -> int:
        """Returns how many it opens at most; a thread more waits for one."""
        return int(self.engine.pool.size())  # type: ignore[attr-defined]  # of the pool that `_make_engine` makes

    def new_id(self) -> str:
        """A new id in the order of the database's time: later ids are greater, with any clock here."""
        return uuid7(self._clock.now_s())

    def _read_clock(self, connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        cursor.execute("SELECT extract(epoch FROM clock_timestamp())::float8")
        (there_s,) = cursor.fetchone() or (time.time(),)
        cursor.close()
        # psycopg began a transaction for the SELECT; the pool expects a connection without one.
        connection.rollback()
        self._clock.agree(there_s)

    def look(self, work: Callable[[Session], T]) -> T:
        """Like `run`, for work that reads, with one statement: it needs no transaction.

        Raises:
            StoreError: as `run`.
        """
        return self._run(self._looker, work)

    def run(self, work: Callable[[Session], T], *, write: bool = True) -> T:
        """One unit of work: begin, `work(session)`, commit; on a passing fault all of it again, up to five times.

        `work` may thus run several times, and once more after a commit whose answer was lost: what it writes must
        be the same each time (ids made outside, inserts that ignore what is there). It returns plain values, no
        rows bound to the session. `write=False`, for work that only reads, spares SQLite's write lock.

        Raises:
            StoreUnavailableError: the database did not answer, stayed busy five times, or only reads.
            CommitUnknownError: the answer to a commit was lost, and no later try told what became of it.
            StoreFullError: its disk is full.
            StoreRefusedError: a constraint or trigger, or a value that it cannot hold.
            StoreError: its user lacks a right, or it was not migrated.
        """
        return self._run(self._writer if write else self.engine, work)

    def _run(self, bind: Engine, work: Callable[[Session], T]) -> T:
        unknown = False
        for tried in range(1, MAX_TRIES + 1):
            committing = False
            try:
                with self._session(bind) as session, session.begin():
                    result = work(session)
                    # From here to the answer of COMMIT an error leaves open
                    # whether it was done. What only reads has nothing to lose.
                    committing = bind is self._writer
            except SQLAlchemyError as error:
                fault = classify(error)
                # Stays set: a later try that fails does not tell what became of this one.
                unknown = unknown or (committing and loses_connection(error))
                if is_read_only(error):
                    # The pool's connections lead to the same server; its address may lead to another one by now.
                    self.engine.dispose()
                if fault is not DbFault.RETRY or tried == MAX_TRIES:
                    raise commit_unknown(error) if unknown else translate(error, fault) from error
                wait_s = jittered(_FIRST_WAIT_S * 2**tried)
                _log.info("transaction_retried", tried=tried, wait_s=round(wait_s, 3), error=type(error).__name__)
            else:
                return result
            # Outside of the session: its connection is back in the pool, and a wait holds no lock.
            time.sleep(wait_s)
        raise AssertionError("unreachable")

    def _session(self, bind: Engine) -> Session:
        return Session(bind, expire_on_commit=False, autoflush=False, info={NEW_ID: self.new_id})

    def close(self) -> None:
        """Closes the pooled connections; a later `run` would open new ones."""
        self.engine.dispose()


def open_store(url: str, *, threads: int = 8, create: bool = True) -> Store:
    """Opens (and for SQLite creates, empty and private) the database that a URL names; connects to PostgreSQL lazily.

    Args:
        url: where it is.
        threads: how many use it at a time.
        create: whether a file of SQLite's that is not there is made.

    Raises:
        ConfigurationError: a URL that cannot be read, another kind of database, or one that lives in memory.
        StoreError: the file is not there and is not to be made.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError("database_url is not a URL such as postgresql+psycopg://user@host/name") from None
    kind = parsed.drivername
    if kind in {"sqlite", "sqlite+pysqlite"}:
        return Store(_open_sqlite(parsed, threads, create=create))
    if kind in {"postgres", "postgresql", "postgresql+psycopg"}:
        return _open_postgresql(parsed.set(drivername="postgresql+psycopg"), threads)
    raise ConfigurationError(f"database_url: {kind} is not supported; use sqlite:///… or postgresql+psycopg://…")


# No `pool_pre_ping`: it costs a journey per transaction and proves nothing of the statement that comes next.
# `Store.run` repeats a transaction that met a dead connection, and SQLAlchemy then gives up all that are as old.
def _make_engine(url: URL, threads: int, pool_timeout_s: float, connect_args: Mapping[str, Any]) -> Engine:
    return create_engine(
        url,
        connect_args=dict(connect_args),
        # They hold addresses and content hashes, which belong in no log and no traceback.
        hide_parameters=True,
        json_serializer=_JSON.encode,
        # A number that an operator can count with: no process ever opens more than `pool_size`.
        max_overflow=0,
        pool_recycle=900,
        pool_size=threads + 2,
        pool_timeout=pool_timeout_s,
    )


def _open_postgresql(url: URL, threads: int) -> Store:
    own, typed = _read_parameters(url)
    limits: dict[str, Any] = {
        "application_name": "code_worker",
        "connect_timeout": 5,
        # A server that vanished is noticed after a minute of silence: 30 s, then three questions 10 s apart.
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        # Keepalives are silent while data is unacknowledged: without this a vanished host holds a thread.
        "tcp_user_timeout": 15_000,
    }
    # What the URL says wins.
    given = {**{name: value for name, value in limits.items() if name not in own.query}, **typed}
    options = _joined(url.query.get("options", ()))
    if POOLER not in url.query:
        ours = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
        return Store(_make_engine(own, threads, 10, {**given, "options": f"{ours} {options}".strip()}), url=url)
    # A statement prepared on one of the pooler's connections is unknown to the next, or another's of the same name.
    engine = _make_engine(own, threads, 10, {"prepare_threshold": None, **given})
    event.listen(engine, "begin", partial(_set_for_transaction, wanted={**_SESSION, **_read_options(options)}))
    return Store(engine, url=url, pooled=True)


def _read_parameters(url: URL) -> tuple[URL, dict[str, int | None]]:
    """The URL with those parameters that libpq reads, and the one that psycopg wants as a number.

    Raises:
        ConfigurationError: neither of them knows one.
    """
    from psycopg.pq import Conninfo  # SQLite needs none of it

    known = {option.keyword.decode() for option in Conninfo.get_defaults()} | {_PREPARE, POOLER}
    if unknown := sorted(set(url.query) - known):
        raise ConfigurationError(f"database_url: PostgreSQL's client library has no parameter {', '.join(unknown)}")
    if _joined(url.query.get(POOLER, TRANSACTION)) != TRANSACTION:
        raise ConfigurationError(f"database_url: {POOLER} is {TRANSACTION}, or left out")
    typed: dict[str, int | None] = {}
    if (threshold := _joined(url.query.get(_PREPARE, ()))) != "":
        if threshold.lower() != "none" and not threshold.isdecimal():
            raise ConfigurationError(f"database_url: {_PREPARE} is a number, or none")
        typed[_PREPARE] = None if threshold.lower() == "none" else int(threshold)
    return url.difference_update_query((_PREPARE, POOLER, "options")), typed


def _joined(values: str | Sequence[str]) -> str:
    return values if isinstance(values, str) else " ".join(values)


def _read_options(options: str) -> dict[str, str]:
    """Settings in `-c name=value` form by name, as the server reads them when it is reached without a pooler.

    Raises:
        ConfigurationError: something else, which cannot be set for a transaction.
    """
    if not re.fullmatch(rf"\s*(?:{_OPTION.pattern}\s*)*", options):
        raise ConfigurationError("database_url: behind a pooler options are of the form -c name=value")
    return {name.replace("-", "_"): re.sub(r"\\(.)", r"\1", value) for name, value in _OPTION.findall(options)}


def _set_for_transaction(connection: Connection, *, wanted: Mapping[str, str]) -> None:
    # The third argument makes it SET LOCAL: at commit the pooler's connection is as it was.
    calls = ", ".join(f"set_config(:name{number}, :value{number}, true)" for number in range(len(wanted)))
    values = {f"name{number}": name for number, name in enumerate(wanted)}
    values |= {f"value{number}": value for number, value in enumerate(wanted.values())}
    connection.execute(text(f"SELECT {calls}"), values)


def _open_sqlite(url: URL, threads: int, *, create: bool) -> Engine:
    if not url.database or url.database == ":memory:" or url.query:
        raise ConfigurationError("database_url: SQLite must be a plain file (sqlite:////path/to/file.db)")
    path = Path(url.database).expanduser().absolute()
    if not (create or path.exists()):
        raise StoreError(f"there is no database at {path}: run `code-worker db upgrade`, or name another file")
    _create_private(path)
    # Longer than busy_timeout: a thread in the queue for a connection waits for threads in the queue for the lock.
    engine = _make_engine(url.set(database=str(path)), threads, 60, {"timeout": 30})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_private(path: Path) -> None:
    try:
        make_private(path.parent)
        _create_file(path)
    except OSError as error:
        raise ConfigurationError(
            f"database file {path} cannot be written ({error.strerror}): give this user the right to, or set "
            "CODE_WORKER_DATA_DIR or CODE_WORKER_DATABASE_URL"
        ) from error


def _create_file(path: Path) -> None:
    """Creates the file, or looks whether the one that is there can be written; never opens that one.

    POSIX locks belong to the process: closing any descriptor of a file drops SQLite's locks on it, for every
    connection of this process, and the next process to close the database would delete the log in use.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not path.exists():
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            return
    if not os.access(path, os.R_OK | os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _configure_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    # None: the driver begins no transactions of its own, `_begin_sqlite` does.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _SQLITE_PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN"))
