"""Migrations: up, down, without drift from the models, one at a time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import CheckConstraint, event, inspect, text
from sqlalchemy.pool import Pool

from code_worker.errors import StoreError
from code_worker.store import jobs, migrate
from code_worker.store.engine import Session, Store, open_store
from code_worker.store.models import Base
from tests.store.acts import accept, judged, write


@pytest.fixture
def empty(database_url: str) -> Iterator[Store]:
    with closing(open_store(database_url)) as store:
        yield store


def tables(store: Store) -> set[str]:
    return set(inspect(store.engine).get_table_names()) - {migrate.VERSION_TABLE}


def test_up_makes_every_table_and_down_leaves_nothing(empty: Store) -> None:
    assert migrate.current(empty) is None
    assert migrate.upgrade(empty) is None
    assert migrate.current(empty) == migrate.head()
    assert tables(empty) == set(Base.metadata.tables)
    accept(empty, "s3://b/a")
    migrate.downgrade(empty, "base")
    assert migrate.current(empty) is None
    assert tables(empty) == set()
    migrate.upgrade(empty)
    assert len(accept(empty, "s3://b/a")) == 1


def test_up_again_changes_nothing(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    write(store, judged(job_id))
    assert migrate.upgrade(store) == migrate.head()
    assert store.run(lambda session: jobs.get(session, job_id)) is not None


def test_the_migrations_and_the_models_agree(store: Store) -> None:
    def differences(session: Session) -> list[object]:
        options = {"compare_type": True, "compare_server_default": True, "version_table": migrate.VERSION_TABLE}
        return list(compare_metadata(MigrationContext.configure(session.connection(), opts=options), Base.metadata))

    assert store.run(differences, write=False) == []


INDEXES = {
    "sqlite": "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL",
    "postgresql": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
}


def test_the_indexes_agree_with_their_conditions(empty: Store) -> None:
    # Alembic's comparison does not look at the condition of a partial index.
    def defined() -> dict[str, str]:
        query = text(INDEXES[empty.dialect])
        found = empty.run(lambda session: list(session.execute(query)), write=False)
        return {name: definition for name, definition in found if not name.startswith(migrate.VERSION_TABLE)}

    Base.metadata.create_all(empty.engine)
    wanted = defined()
    Base.metadata.drop_all(empty.engine)
    migrate.upgrade(empty)
    assert any(" WHERE " in one for one in wanted.values())
    assert defined() == wanted


def test_the_check_constraints_agree(store: Store) -> None:
    found = inspect(store.engine)
    for table in Base.metadata.sorted_tables:
        wanted = {str(one.name) for one in table.constraints if isinstance(one, CheckConstraint)}
        assert {one["name"] for one in found.get_check_constraints(table.name)} == wanted, table.name


def test_two_at_once_migrate_once(database_url: str) -> None:
    with closing(open_store(database_url)) as first, closing(open_store(database_url)) as second:
        with ThreadPoolExecutor(2) as pool:
            before = list(pool.map(migrate.upgrade, (first, second)))
        assert sorted(before, key=str) == sorted([None, migrate.head()], key=str)
        assert migrate.current(first) == migrate.head()


def test_an_empty_or_older_database_names_the_command(empty: Store) -> None:
    with pytest.raises(StoreError, match="no tables yet: run `code-worker db upgrade`"):
        migrate.require_current(empty)
    migrate.upgrade(empty)
    migrate.require_current(empty)


def test_a_file_that_is_not_there_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"no database at {tmp_path}/typo/a\.db: run `code-worker db upgrade`"):
        migrate.open_current(f"sqlite:///{tmp_path}/typo/a.db")
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_does_not_fit_is_let_go(database_url: str) -> None:
    open_store(database_url).close()
    made: list[object] = []
    closed: list[object] = []
    listeners = [("connect", lambda one, _: made.append(one)), ("close", lambda one, _: closed.append(one))]
    for name, listener in listeners:
        event.listen(Pool, name, listener)
    try:
        with pytest.raises(StoreError, match="no tables yet"):
            migrate.open_current(database_url)
    finally:
        for name, listener in listeners:
            event.remove(Pool, name, listener)
    assert made
    assert closed == made


def execute(store: Store, *statements: str) -> None:
    store.run(lambda session: [session.execute(text(statement)) for statement in statements])


def stands_in(store: Store, table: str) -> list[str]:
    return store.run(lambda session: list(session.scalars(text(f"SELECT version_num FROM {table}"))), write=False)


# As Alembic makes it for applications that name no table of their own.
SHARED = "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"


def test_a_newer_database_serves_and_is_left_as_it_is(store: Store) -> None:
    execute(store, f"UPDATE {migrate.VERSION_TABLE} SET version_num = 'from_the_future'")
    migrate.require_current(store)
    assert migrate.upgrade(store) == "from_the_future"
    assert stands_in(store, migrate.VERSION_TABLE) == ["from_the_future"]
    with pytest.raises(StoreError, match="from_the_future is unknown to this version"):
        migrate.downgrade(store, "base")


@pytest.mark.parametrize("table", [migrate.VERSION_TABLE, "alembic_version"])
@pytest.mark.parametrize("revision", ["2026_11_28_audit", "2026_12_01_job_retried_at"])
def test_a_database_from_before_the_first_release_is_told_apart(store: Store, revision: str, table: str) -> None:
    execute(store, f"UPDATE {migrate.VERSION_TABLE} SET version_num = '{revision}'")
    if table != migrate.VERSION_TABLE:
        execute(store, f"ALTER TABLE {migrate.VERSION_TABLE} RENAME TO {table}")
    for call in (migrate.require_current, migrate.upgrade, lambda one: migrate.downgrade(one, "base")):
        with pytest.raises(StoreError, match=f"{revision}, of a version before the first release, .* name a new one"):
            call(store)
    assert migrate.current(store) == revision
    assert not migrate.is_newer(revision)
    assert stands_in(store, table) == [revision]


LATER = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "later", "{head}", None, None


def upgrade() -> None:
    op.create_table("later", sa.Column("id", sa.Integer(), primary_key=True))


def downgrade() -> None:
    op.drop_table("later")
"""


def test_a_migration_that_is_added_later_is_run_and_taken_back(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = migrate.head()
    added = shutil.copytree(migrate._directory(), tmp_path / "migrations")
    (added / "versions" / "2027_01_01-later.py").write_text(LATER.format(head=head), encoding="utf-8")
    monkeypatch.setattr(migrate, "_directory", lambda: added)
    with pytest.raises(StoreError, match=f"is at revision {head} and this version needs later: run `code-worker db"):
        migrate.require_current(store)
    assert migrate.upgrade(store) == head
    migrate.require_current(store)
    assert "later" in tables(store)
    migrate.downgrade(store, head)
    assert migrate.current(store) == head
    assert "later" not in tables(store)


@pytest.mark.parametrize("beside", [False, True])
def test_another_applications_database_is_refused_unless_it_is_meant(empty: Store, beside: bool) -> None:
    execute(empty, SHARED, "INSERT INTO alembic_version VALUES ('8f3a1c')", "CREATE TABLE orders (id INTEGER)")
    if not beside:
        with pytest.raises(StoreError, match="another application's database: its alembic_version is at 8f3a1c"):
            migrate.upgrade(empty)
        with pytest.raises(StoreError, match="another application's database"):
            migrate.require_current(empty)
        assert tables(empty) == {"alembic_version", "orders"}
        return
    migrate.upgrade(empty, beside=True)
    migrate.require_current(empty)
    assert stands_in(empty, "alembic_version") == ["8f3a1c"]
    migrate.downgrade(empty, "base")
    assert tables(empty) == {"alembic_version", "orders"}


@pytest.mark.parametrize("beside", [False, True])
def test_tables_of_our_names_that_we_did_not_make_are_never_touched(empty: Store, beside: bool) -> None:
    execute(empty, "CREATE TABLE jobs (id INTEGER)")
    with pytest.raises(StoreError, match="another application's database: it has tables jobs "):
        migrate.upgrade(empty, beside=beside)
    assert tables(empty) == {"jobs"}


def test_migrating_leaves_logging_alone(empty: Store) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("code_worker").disabled)
    migrate.upgrade(empty)
    assert (root.level, list(root.handlers), logging.getLogger("code_worker").disabled) == before


@pytest.mark.parametrize("url", ["sqlite:////tmp/none.db", "postgresql://nobody@nowhere/none"])
def test_the_sql_can_be_had_without_a_database(url: str) -> None:
    written = migrate.script(url)
    assert "CREATE TABLE verdicts" in written
    assert "verdicts_immutable" in written
    assert f"'{migrate.head()}'" in written


def test_the_sql_that_is_printed_makes_the_same_database(postgres_url: str) -> None:
    with closing(open_store(postgres_url)) as store:
        statements = migrate.script(postgres_url).replace("BEGIN;", "", 1).rpartition("COMMIT;")[0]
        store.run(lambda session: session.connection().exec_driver_sql(statements))
        migrate.require_current(store)
        assert tables(store) == set(Base.metadata.tables)
