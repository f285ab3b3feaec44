"""Behind PgBouncer in transaction mode: each transaction may have another connection, and few parameters pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, text

from code_worker.errors import ConfigurationError, StoreUnavailableError
from code_worker.settings import Settings
from code_worker.store import migrate
from code_worker.store.engine import Session, Store, open_store
from code_worker.store.retention import purge
from tests.pooler import POOLERS, pooler, through
from tests.store.acts import accept, judged, write

SHOWN = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "timezone")


@pytest.fixture(params=POOLERS)
def port(request: pytest.FixtureRequest, migrated_postgres_url: str) -> Iterator[int]:
    with pooler(request.param, migrated_postgres_url) as running:
        yield running


@pytest.fixture
def pooled(port: int, migrated_postgres_url: str) -> Iterator[Store]:
    settings = Settings(database_url=SecretStr(through(migrated_postgres_url, port)), database_pooler="transaction")
    with closing(open_store(settings.resolved_database_url)) as store:
        yield store


def shown(store: Store, *names: str) -> list[object]:
    return store.run(lambda session: [session.scalar(text(f"SHOW {name}")) for name in names])


def backend(session: Session) -> object:
    return session.scalar(text("SELECT pg_backend_pid()"))


def test_each_transaction_has_another_connection_and_all_our_limits(pooled: Store) -> None:
    two_at_once = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        pids = list(pool.map(pooled.run, [lambda session: (backend(session), two_at_once.wait())] * 2))
    assert len(pids) == 2
    assert len({pooled.run(backend) for _ in range(6)}) > 1
    for _ in range(4):
        assert shown(pooled, *SHOWN) == ["15s", "5s", "30s", "UTC"]
        assert pooled.look(lambda session: session.scalar(text("SHOW lock_timeout"))) == "5s"


def test_options_of_the_url_win_behind_it_too(port: int, migrated_postgres_url: str) -> None:
    options = r"-c statement_timeout=7s --lock-timeout=3s -c search_path=public,\ pg_catalog"
    with closing(open_store(through(migrated_postgres_url, port, options=options, pooler="transaction"))) as store:
        assert shown(store, *SHOWN, "search_path") == ["7s", "3s", "30s", "UTC", "public, pg_catalog"]


def test_nothing_of_ours_stays_on_a_connection(pooled: Store, migrated_postgres_url: str, port: int) -> None:
    for _ in range(6):
        shown(pooled, "timezone")
    purge(pooled)
    name = make_url(migrated_postgres_url).database
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname={name}", autocommit=True) as another:
        another.prepare_threshold = None
        for _ in range(6):
            assert another.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
            assert another.execute("SHOW lock_timeout").fetchone() == ("0",)


def test_jobs_are_accepted_and_judged_by_many_threads(pooled: Store) -> None:
    def work(number: int) -> int:
        ids = accept(pooled, *(f"s3://b/{number}/{image}" for image in range(3)))
        for _ in range(4):  # more often than it takes for a statement to be prepared
            pooled.look(lambda session: session.scalar(text("SELECT 1")))
        write(pooled, *(judged(job_id) for job_id in ids))
        return len(ids)

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(18))) == 54
    decided = pooled.run(lambda session: session.scalar(text("SELECT count(*) FROM verdicts")))
    assert decided == 54


def test_it_is_migrated_through_it(port: int, postgres_url: str) -> None:
    with closing(open_store(through(postgres_url, port, pooler="transaction"))) as store:
        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(lambda _: migrate.upgrade(store), range(2)), key=str) == [migrate.head(), None]
        migrate.require_current(store)
        migrate.downgrade(store, "base")


def test_without_the_mode_the_error_names_it(port: int, migrated_postgres_url: str) -> None:
    with (
        closing(open_store(through(migrated_postgres_url, port))) as store,
        pytest.raises(
            StoreUnavailableError, match=r"unsupported startup parameter.*CODE_WORKER_DATABASE_POOLER=trans"
        ),
    ):
        store.run(backend)


def test_a_statement_that_is_prepared_elsewhere_names_the_mode_too(postgres_store: Store) -> None:
    def execute(session: Session) -> None:
        session.execute(text("EXECUTE prepared_by_another"))

    with pytest.raises(StoreUnavailableError, match="does not exist; a pooler in transaction mode"):
        postgres_store.run(execute)


@pytest.mark.parametrize("threshold", ["0", "7", "none", "None"])
def test_parameters_of_the_url_become_what_the_driver_takes(migrated_postgres_url: str, threshold: str) -> None:
    url = f"{migrated_postgres_url}&prepare_threshold={threshold}&connect_timeout=7&application_name=mine"
    with closing(open_store(url)) as store:
        assert store.run(lambda session: session.scalar(text("SHOW application_name"))) == "mine"
        with store.engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            assert driver.prepare_threshold == (None if threshold.lower() == "none" else int(threshold))
            assert driver.info.get_parameters()["connect_timeout"] == "7"


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("prepare_threshold=often", "prepare_threshold is a number, or none"),
        ("pooler=session", "pooler is transaction"),
        ("row_factory=x", "no parameter row_factory"),
        ("options=-c%20a&pooler=transaction", "of the form -c name=value"),
        ("options=-B%205&pooler=transaction", "of the form -c name=value"),
    ],
)
def test_parameters_that_nobody_reads_are_a_wrong_setting(parameter: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"database_url: .*{said}"):
        open_store(f"postgresql://h/db?{parameter}")
