"""The unit of work: what it refuses, what it retries, and what its errors say."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError

from code_worker.errors import ConfigurationError, StoreError, StoreFullError, StoreUnavailableError
from code_worker.store import engine, jobs, migrate
from code_worker.store.engine import MAX_TRIES, Session, Store, open_store
from code_worker.store.ids import uuid7, uuid7_floor
from code_worker.store.models import JobRow, db_now, db_now_plus
from code_worker.store.retention import purge
from code_worker.store.sql import new_id
from code_worker.types import JobState
from tests.faults.rows import Seen, row
from tests.servers import free_port
from tests.store.acts import accept, info


@pytest.mark.parametrize(
    "url",
    [
        "mysql://host/db",
        "postgresql+asyncpg://host/db",
        "sqlite://",
        "sqlite:///:memory:",
        "no url",
        "sqlite:///a?b=c",
    ],
)
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="database_url"):
        open_store(url)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgresql_may_be_called_as_one_likes(scheme: str) -> None:
    with closing(open_store(f"{scheme}://host/db")) as store:
        assert store.dialect == "postgresql"
        assert store.url == "postgresql+psycopg://host/db"


def test_a_new_sqlite_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "data" / "deep" / "ledger.db"
    with closing(open_store(f"sqlite:///{path}")) as store:
        store.run(lambda session: session.execute(text("CREATE TABLE t (id int)")))
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"in_the_way\.db cannot be written"):
        open_store(f"sqlite:///{tmp_path / 'file' / 'in_the_way.db'}")


def test_sqlite_is_set_up_for_many_threads(sqlite_store: Store) -> None:
    def pragmas(session: Session) -> list[object]:
        names = ("journal_mode", "busy_timeout", "synchronous", "foreign_keys")
        return [session.scalar(text(f"PRAGMA {name}")) for name in names]

    assert sqlite_store.run(pragmas) == ["wal", 30000, 1, 1]


def test_postgresql_is_set_up_to_let_go(postgres_store: Store) -> None:
    def settings(session: Session) -> list[object]:
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "timezone")
        return [session.scalar(text(f"SHOW {name}")) for name in names]

    assert postgres_store.run(settings) == ["15s", "5s", "30s", "UTC"]


def test_options_of_the_url_win(postgres_store: Store) -> None:
    with closing(open_store(f"{postgres_store.url}&options=-c%20statement_timeout%3D7000")) as store:
        assert store.run(lambda session: session.scalar(text("SHOW statement_timeout"))) == "7s"
        assert store.run(lambda session: session.scalar(text("SHOW lock_timeout"))) == "5s"


def test_nothing_is_written_when_the_work_raises(store: Store) -> None:
    def work(session: Session) -> None:
        jobs.accept(session, [jobs.NewJob("s3://b/a")])
        raise LookupError("changed my mind")

    with pytest.raises(LookupError):
        store.run(work)
    assert store.run(jobs.counts)[JobState.ACCEPTED] == 0


def test_the_databases_clock_compares_with_stored_times(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")

    def compare(session: Session) -> tuple[bool, ...]:
        created = JobRow.created_at
        row = session.execute(
            select(
                created <= db_now(),
                created > db_now_plus(-60),
                created < db_now_plus(0.5),
                db_now_plus(-1) < db_now(),
            )
        ).one()
        found = session.scalars(select(JobRow.id).where(created == info(store, job_id).created_at)).all()
        return (*map(bool, row), found == [job_id])

    assert store.run(compare, write=False) == (True,) * 5


def test_ids_are_in_the_order_of_the_databases_time_whatever_this_machines_clock_says(
    postgres_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres_store.run(jobs.counts, write=False)
    before = postgres_store.new_id()
    ahead_ns = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr("code_worker.store.ids.time.time_ns", lambda: ahead_ns)
    there = postgres_store.run(migrate.server_time, write=False)
    after = postgres_store.new_id()
    within = postgres_store.run(new_id)
    assert before < after < within < uuid7_floor(there + timedelta(minutes=5)) < uuid7()


@row(
    "F14",
    injection="SQLSTATE 40001: a serialization failure",
    expected="the whole transaction again, at most 5 times",
)
def test_a_serialization_failure_runs_the_whole_transaction_again(postgres_store: Store, seen: Seen) -> None:
    accept(postgres_store, "s3://b/a")
    tries = 0

    def work(session: Session) -> int:
        nonlocal tries
        tries += 1
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        attempts = session.scalar(text("SELECT attempts FROM jobs")) or 0
        if tries == 1:
            postgres_store.run(lambda other: other.execute(text("UPDATE jobs SET attempts = 40")))
        session.execute(text("UPDATE jobs SET attempts = :more"), {"more": attempts + 1})
        return attempts

    assert postgres_store.run(work) == 40
    assert tries == 2
    assert postgres_store.run(lambda session: session.scalar(text("SELECT attempts FROM jobs"))) == 41
    seen(tries=tries)


@row(
    "F14",
    injection="SQLSTATE 57P01: the backend is terminated",
    expected="the whole transaction again, at most 5 times",
)
def test_a_connection_that_was_cut_runs_the_whole_transaction_again(postgres_store: Store, seen: Seen) -> None:
    tries = 0

    def work(session: Session) -> list[str]:
        nonlocal tries
        tries += 1
        made = jobs.accept(session, [jobs.NewJob(f"s3://b/{tries}")])
        if tries == 1:
            pid = session.scalar(text("SELECT pg_backend_pid()"))
            postgres_store.run(lambda other: other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid}))
        session.execute(text("SELECT 1"))
        return made

    (job_id,) = postgres_store.run(work)
    assert tries == 2
    assert info(postgres_store, job_id).uri == "s3://b/2"
    assert postgres_store.run(jobs.counts)[JobState.ACCEPTED] == 1
    seen(tries=tries)


@row(
    "F14",
    injection="SQLSTATE 40P01: two transactions deadlock",
    expected="the whole transaction again, at most 5 times",
)
def test_a_deadlock_ends_with_both_transactions_committed(postgres_store: Store, seen: Seen) -> None:
    ids = accept(postgres_store, "s3://b/1", "s3://b/2")
    both, tries = threading.Barrier(2), [0, 0]

    def add(place: int) -> None:
        def work(session: Session) -> None:
            tries[place] += 1
            for number, job in enumerate(ids if place else reversed(ids)):
                update = text("UPDATE jobs SET faults = faults + 1 WHERE id = :job")
                session.execute(update, {"job": job})
                if number == 0 and tries[place] == 1:
                    both.wait(120)

        postgres_store.run(work)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add, range(2)))
    assert sorted(tries) == [1, 2], "one was the victim"
    faults = postgres_store.run(lambda session: list(session.scalars(text("SELECT faults FROM jobs"))))
    assert faults == [2, 2]
    seen(tries=sum(tries))


@row("F14", injection="SQLSTATE 53300: too many connections", expected="the whole transaction again, at most 5 times")
def test_a_server_without_a_free_connection_is_asked_again(
    postgres_store: Store, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    name = postgres_store.engine.url.database
    postgres_store.run(lambda session: session.execute(text(f"ALTER DATABASE {name} CONNECTION LIMIT 0")) and None)
    plain = postgres_store.engine.url.set(username="nobody_special")
    postgres_store.run(lambda session: session.execute(text("CREATE ROLE nobody_special LOGIN")) and None)
    waits: list[float] = []

    def free(wait_s: float) -> None:
        waits.append(wait_s)
        if len(waits) == 2:
            limit = text(f"ALTER DATABASE {name} CONNECTION LIMIT -1")
            postgres_store.run(lambda session: session.execute(limit) and None)

    monkeypatch.setattr(engine.time, "sleep", free)
    try:
        with closing(open_store(plain.render_as_string(hide_password=False))) as other:
            assert other.run(lambda session: session.scalar(text("SELECT 1")), write=False) == 1
    finally:
        postgres_store.run(lambda session: session.execute(text("DROP ROLE nobody_special")) and None)
    seen(tries=len(waits) + 1)


def test_a_locked_sqlite_is_tried_again_and_then_unavailable(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sqlite_store.close()
    event.listen(sqlite_store.engine, "connect", lambda made, _: made.execute("PRAGMA busy_timeout = 10"))
    with closing(sqlite3.connect(sqlite_store.engine.url.database or "", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(engine.time, "sleep", waits.append)
        with pytest.raises(StoreUnavailableError, match="locked"):
            accept(sqlite_store, "s3://b/a")
        assert len(waits) == MAX_TRIES - 1
        assert sqlite_store.run(jobs.counts, write=False)[JobState.ACCEPTED] == 0
        monkeypatch.setattr(engine.time, "sleep", lambda _: other.in_transaction and other.execute("ROLLBACK"))
        accept(sqlite_store, "s3://b/a")
    assert sqlite_store.run(jobs.counts)[JobState.ACCEPTED] == 1


def test_a_database_that_is_away_is_unavailable_and_its_password_stays_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(engine.time, "sleep", waits.append)
    url = f"postgresql://me:hunter2@127.0.0.1:{free_port()}/db"
    with closing(open_store(url)) as store, pytest.raises(StoreUnavailableError, match="does not answer") as raised:
        store.run(jobs.counts)
    assert "hunter2" not in str(raised.value)
    assert len(waits) == MAX_TRIES - 1


def test_a_full_disk_is_called_storage_full(sqlite_store: Store) -> None:
    sqlite_store.close()
    event.listen(sqlite_store.engine, "connect", lambda made, _: made.execute("PRAGMA max_page_count = 1"))
    with pytest.raises(StoreFullError, match="storage_full"):
        accept(sqlite_store, *(f"s3://b/{'a' * 3000}/{number}" for number in range(100)))
    assert sqlite_store.run(jobs.counts)[JobState.ACCEPTED] == 0


def test_a_broken_rule_is_a_store_error_without_the_statement(store: Store) -> None:
    accept(store, "s3://b/secret")
    with pytest.raises(StoreError, match="the database refused") as raised:
        store.run(lambda session: session.execute(text("UPDATE jobs SET priority = 77")))
    assert "secret" not in str(raised.value)
    assert "UPDATE" not in str(raised.value)


def test_a_database_without_tables_says_how_to_make_them(database_url: str) -> None:
    with closing(open_store(database_url)) as store, pytest.raises(StoreError, match="code-worker db upgrade"):
        store.run(jobs.counts)


def test_a_bug_of_ours_keeps_its_own_type(store: Store) -> None:
    with pytest.raises(DBAPIError):
        store.run(lambda session: session.execute(text("SELEC 1")))


_WRITER = """
import sys, time
from code_worker.store import jobs
from code_worker.store.engine import open_store
store = open_store(sys.argv[1])
times = []
def timed(work):
    began = time.perf_counter()
    done = store.run(work)
    times.append(1000 * (time.perf_counter() - began))
    return done
for number in range(60):
    (job,) = timed(lambda session: jobs.accept(session, [jobs.NewJob(f"s3://b/{sys.argv[2]}/{number}")]))
    timed(lambda session: jobs.claim(session, [job], owner=sys.argv[2], lease_s=30, max_attempts=3))
store.close()
print(*times)
"""


@row(
    "F15", injection="4 processes write one SQLite file", expected="0 × database is locked; p99 of a commit < 250 ms"
)
def test_many_processes_write_one_sqlite_file(sqlite_store: Store, seen: Seen) -> None:
    command = [sys.executable, "-W", "error", "-c", _WRITER, sqlite_store.url]
    pipe = subprocess.PIPE
    writers = [subprocess.Popen([*command, f"p{number}"], stdout=pipe, stderr=pipe) for number in range(4)]
    told, said = zip(*(writer.communicate(timeout=120) for writer in writers), strict=True)
    assert [writer.returncode for writer in writers] == [0] * 4, said
    assert not any(b"retried" in text for text in said)
    assert sqlite_store.run(jobs.counts)[JobState.RUNNING] == 240
    times = sorted(float(time) for text in told for time in text.split())
    seen(commits=len(times), locked=0, p99_ms=times[int(0.99 * len(times))])


def test_a_purge_that_is_cancelled_leaves_every_connection_its_limits(postgres_store: Store) -> None:
    waiting = text("SELECT pid FROM pg_stat_activity WHERE query LIKE 'VACUUM%' AND wait_event_type = 'Lock'")
    with ThreadPoolExecutor(1) as pool, postgres_store.engine.connect() as other:
        other.execute(text("BEGIN"))
        other.execute(text("LOCK TABLE verdicts IN SHARE UPDATE EXCLUSIVE MODE"))
        purging = pool.submit(purge, postgres_store)
        while (pid := other.scalar(waiting)) is None and not purging.done():
            other.execute(text("SELECT pg_stat_clear_snapshot()"))
        other.execute(text("SELECT pg_cancel_backend(:pid)"), {"pid": pid})
        with pytest.raises(StoreError):
            purging.result(30)
        other.execute(text("ROLLBACK"))
    with ExitStack() as opened:
        limits = []
        for _ in range(3):
            connection = opened.enter_context(postgres_store.engine.connect())
            limits.append(connection.scalar(text("SHOW statement_timeout")))
    assert limits == ["15s"] * 3
