"""What each error of a database means, and that none is left without a meaning."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from code_worker.client import Client
from code_worker.errors import CommitUnknownError, StoreError, StoreRefusedError, StoreUnavailableError
from code_worker.settings import Settings
from code_worker.store import jobs, policies, releases, verdicts, workers
from code_worker.store.database_errors import SQLSTATES, DbFault, classify, loses_connection
from code_worker.store.engine import Session, Store, open_store
from code_worker.store.ids import uuid7
from code_worker.types import JobState
from tests.faults.proxy import TcpProxy
from tests.servers import PostgresServer
from tests.store.acts import accept, judged

_STATES = sorted(
    (kind.sqlstate, kind)
    for kind in vars(psycopg.errors).values()
    if isinstance(kind, type) and issubclass(kind, psycopg.Error) and "sqlstate" in vars(kind) and kind.sqlstate
)


def _wrapped(error: psycopg.Error) -> DBAPIError:
    wrapped = DBAPIError.instance("", {}, error, psycopg.Error)
    assert isinstance(wrapped, DBAPIError)
    return wrapped


def test_every_class_of_sqlstates_that_the_driver_knows_has_a_row() -> None:
    assert len(_STATES) > 250
    assert not {state for state, _ in _STATES if state[:2] not in {known[:2] for known in SQLSTATES}}


def test_no_row_names_a_state_that_there_is_not() -> None:
    known = {state for state, _ in _STATES}
    assert not {row for row in SQLSTATES if row not in known | {state[:2] for state in known}}


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (psycopg.errors.SerializationFailure, DbFault.RETRY),
        (psycopg.errors.DeadlockDetected, DbFault.RETRY),
        (psycopg.errors.TooManyConnections, DbFault.RETRY),
        (psycopg.errors.AdminShutdown, DbFault.RETRY),
        (psycopg.errors.CrashShutdown, DbFault.RETRY),
        (psycopg.errors.CannotConnectNow, DbFault.RETRY),
        (psycopg.errors.ConnectionFailure, DbFault.RETRY),
        (psycopg.errors.LockNotAvailable, DbFault.RETRY),
        (psycopg.errors.IdleInTransactionSessionTimeout, DbFault.RETRY),
        (psycopg.OperationalError, DbFault.RETRY),
        (psycopg.errors.DiskFull, DbFault.FULL),
        (psycopg.errors.InvalidPassword, DbFault.UNAVAILABLE),
        (psycopg.errors.QueryCanceled, DbFault.UNAVAILABLE),
        (psycopg.errors.ReadOnlySqlTransaction, DbFault.UNAVAILABLE),
        (psycopg.errors.OutOfMemory, DbFault.UNAVAILABLE),
        (psycopg.errors.IndexCorrupted, DbFault.UNAVAILABLE),
        (psycopg.errors.ObjectNotInPrerequisiteState, DbFault.UNAVAILABLE),
        (psycopg.errors.UndefinedTable, DbFault.UNMIGRATED),
        (psycopg.errors.InsufficientPrivilege, DbFault.FORBIDDEN),
        (psycopg.errors.UniqueViolation, DbFault.REFUSED),
        (psycopg.errors.RaiseException, DbFault.REFUSED),
        (psycopg.errors.ProgramLimitExceeded, DbFault.UNSTORABLE),
        (psycopg.errors.NumericValueOutOfRange, DbFault.UNSTORABLE),
        (psycopg.DataError, DbFault.UNSTORABLE),
        (psycopg.errors.SyntaxError, DbFault.BUG),
        (psycopg.errors.ActiveSqlTransaction, DbFault.BUG),
    ],
)
def test_a_state_of_postgresql_has_its_meaning(error: type[psycopg.Error], fault: DbFault) -> None:
    assert classify(_wrapped(error())) is fault


def test_only_what_leaves_the_outcome_open_makes_a_commit_unknown() -> None:
    open_ended = {state for state, kind in _STATES if loses_connection(_wrapped(kind()))}
    assert {"08006", "08007", "40003", "57P01", "57P02"} <= open_ended
    assert not open_ended & {"40001", "40P01", "23505", "25006", "53100", "57014"}
    assert loses_connection(_wrapped(psycopg.OperationalError("the connection is lost")))


def _sqlite_codes() -> list[int]:
    named = {name: value for name, value in vars(sqlite3).items() if name.startswith("SQLITE_")}
    # Numbers of other kinds, authorizer actions and limits, share the prefix.
    results = "ERROR INTERNAL PERM ABORT BUSY LOCKED NOMEM READONLY INTERRUPT IOERR CORRUPT FULL CANTOPEN PROTOCOL"
    results += " SCHEMA TOOBIG CONSTRAINT MISMATCH MISUSE NOLFS AUTH RANGE NOTADB"
    return [named[f"SQLITE_{name}"] for name in results.split()]


def test_only_mistakes_of_ours_are_bugs_to_sqlite() -> None:
    bugs = set()
    for code in _sqlite_codes():
        error = sqlite3.OperationalError("something")
        error.sqlite_errorcode = code
        wrapped = DBAPIError.instance("", {}, error, sqlite3.Error)
        assert isinstance(wrapped, DBAPIError)
        if classify(wrapped) is DbFault.BUG:
            bugs.add(code)
    mistakes = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_INTERNAL, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_MISUSE)
    assert bugs == {*mistakes, sqlite3.SQLITE_RANGE}


def set_read_only(server: PostgresServer, store: Store, *, on: bool) -> None:
    """Makes the database read-only, or not, for connections made from now on, as a failover does."""
    name = store.engine.url.database
    server._sql(f"ALTER DATABASE {name} SET default_transaction_read_only = {'on' if on else 'off'}")


def test_a_server_that_only_reads_is_away_and_a_new_connection_is_tried_next(
    postgres_server: PostgresServer, postgres_store: Store
) -> None:
    set_read_only(postgres_server, postgres_store, on=True)
    with pytest.raises(StoreUnavailableError, match="read-only transaction"):
        accept(postgres_store, "s3://b/a")
    set_read_only(postgres_server, postgres_store, on=False)
    # The session before was a read-only one for good; were it used again, this would fail as well.
    accept(postgres_store, "s3://b/a")
    assert postgres_store.run(jobs.counts)[JobState.ACCEPTED] == 1


def test_a_user_without_a_right_is_told_and_is_no_outage(
    postgres_server: PostgresServer, postgres_store: Store
) -> None:
    postgres_server._sql("CREATE ROLE reads_nothing LOGIN")
    url = postgres_store.engine.url.set(username="reads_nothing").render_as_string(hide_password=False)
    try:
        with closing(open_store(url)) as other, pytest.raises(StoreError, match="may not do this") as raised:
            accept(other, "s3://b/a")
        assert not isinstance(raised.value, StoreUnavailableError | StoreRefusedError)
    finally:
        postgres_server._sql("DROP ROLE reads_nothing")


def test_a_value_that_no_index_holds_is_refused(postgres_store: Store) -> None:
    # Random, or the index would hold it compressed.
    long = "".join(f"{number * 2654435761 % 2**32:08x}" for number in range(500))
    with pytest.raises(StoreRefusedError, match="cannot store this"):
        postgres_store.run(lambda session: policies.put(session, low=0.1, high=0.9, tenant=long, by="me"))


@pytest.fixture
def client(lossy_postgres: tuple[TcpProxy, str], tmp_path: Path) -> Iterator[Client]:
    settings = Settings(data_dir=tmp_path, database_url=lossy_postgres[1], broker_url="redis://127.0.0.1:1/0")
    with closing(Client(settings)) as made:
        yield made


def test_a_commit_whose_answer_is_lost_is_said_to_be_unknown_and_the_key_tells(
    client: Client, lossy_postgres: tuple[TcpProxy, str], postgres_store: Store
) -> None:
    proxy, _ = lossy_postgres
    proxy.cut_at_answer_to(b"COMMIT")
    with pytest.raises(CommitUnknownError, match="the same key") as raised:
        client.enqueue("s3://b/a.jpg", tenant="acme", key="post-1")
    assert proxy.cut.is_set()
    (there,) = postgres_store.run(lambda session: jobs.list_jobs(session, limit=9))
    assert raised.value.job_ids == (there.id,)
    assert there.id in str(raised.value)
    proxy.refuse(refusing=False)
    assert client.enqueue("s3://b/a.jpg", tenant="acme", key="post-1") == there.id
    assert postgres_store.run(jobs.counts)[JobState.ACCEPTED] == 1


def test_a_lost_answer_that_a_later_try_makes_up_for_is_no_error(
    client: Client, lossy_postgres: tuple[TcpProxy, str], postgres_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _ = lossy_postgres
    proxy.cut_at_answer_to(b"COMMIT")
    monkeypatch.setattr("code_worker.store.engine.time.sleep", lambda _: proxy.refuse(refusing=False))
    job = client.enqueue("s3://b/a.jpg")
    assert proxy.cut.is_set()
    (there,) = postgres_store.run(lambda session: jobs.list_jobs(session, limit=9))
    assert there.id == job


def test_a_connection_that_is_cut_before_the_commit_accepted_nothing(
    client: Client, lossy_postgres: tuple[TcpProxy, str], postgres_store: Store
) -> None:
    proxy, _ = lossy_postgres
    proxy.cut_at_answer_to(b"INSERT INTO jobs")
    with pytest.raises(StoreUnavailableError, match="does not answer") as raised:
        client.enqueue("s3://b/a.jpg")
    assert proxy.cut.is_set()
    assert not isinstance(raised.value, CommitUnknownError)
    assert postgres_store.run(jobs.counts)[JobState.ACCEPTED] == 0


def _champion_of_two(session: Session) -> None:
    for release in ("r1", "r2", "r3"):
        manifest = {"heads": {"linear": {}}}
        releases.add(
            session, id=release, manifest_sha256=release, location=release, manifest=manifest, source="s", by="ann"
        )
    for release in ("r1", "r2"):
        releases.move_alias(session, "champion", release, by="ann", reason="")
    jobs.accept(session, [_JOB])


_JOB = jobs.NewJob("s3://b/judged.jpg")
_IDS = [uuid7() for _ in range(3)]
ACTS: dict[str, tuple[Callable[[Session], object], str, Any]] = {
    "a policy": (
        lambda session: policies.put(session, low=0.4, high=0.6, by="ann", policy_id=_IDS[0]).version,
        "SELECT count(*) FROM policies",
        1,
    ),
    "a promotion": (
        lambda session: releases.move_alias(session, "champion", "r3", by="ann", reason="better"),
        "SELECT count(*) FROM alias_moves WHERE release_id = 'r3'",
        "r3",
    ),
    "a rollback": (
        lambda session: releases.rollback(session, "champion", by="ann", reason="worse", move=2),
        "SELECT count(*) FROM alias_moves WHERE undoes IS NOT NULL",
        "r1",
    ),
    "a retired release": (
        lambda session: releases.retire(session, "r3", "erased"),
        "SELECT count(*) FROM releases WHERE status = 'erased'",
        True,
    ),
    "a verdict": (
        lambda session: verdicts.write(session, [replace(judged(_JOB.id), id=_IDS[1])]),
        "SELECT count(*) FROM verdicts",
        [_JOB.id],
    ),
    "a dead letter": (
        lambda session: workers.dead_letter(session, task="t", body="b", error="e", letter_id=_IDS[2]),
        "SELECT count(*) FROM dead_letters",
        _IDS[2],
    ),
}


@pytest.mark.parametrize("act", ACTS)
def test_what_is_repeated_after_a_lost_answer_is_done_once_and_told_as_done(
    act: str, lossy_postgres: tuple[TcpProxy, str], postgres_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, count, told = ACTS[act]
    proxy, url = lossy_postgres
    postgres_store.run(_champion_of_two)
    entries = postgres_store.run(lambda session: session.scalar(text("SELECT count(*) FROM audit")))
    monkeypatch.setattr("code_worker.store.engine.time.sleep", lambda _: proxy.refuse(refusing=False))
    with closing(open_store(url)) as store:
        proxy.cut_at_answer_to(b"COMMIT")
        assert store.run(work) == told
        assert proxy.cut.is_set()
    done, after = postgres_store.run(
        lambda session: (session.scalar(text(count)), session.scalar(text("SELECT count(*) FROM audit")))
    )
    assert done == 1
    assert after - entries <= 1, "and audited once"
