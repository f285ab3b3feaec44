"""`code-worker db`, as a person or a deployment runs it."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text

from code_worker.cli.main import cli
from code_worker.errors import StoreError
from code_worker.store import migrate
from code_worker.store.engine import Store, open_store
from tests.cli.conftest import Cli
from tests.servers import PostgresServer


def run(url: str, *arguments: str) -> Result:
    return CliRunner(env={"CODE_WORKER_DATABASE_URL": url}).invoke(cli, ["db", *arguments], catch_exceptions=False)


def test_an_empty_database_is_upgraded_once(database_url: str) -> None:
    assert run(database_url, "current").exit_code == 1
    first = run(database_url, "upgrade")
    assert (first.exit_code, first.stdout) == (0, f"database upgraded from empty to {migrate.head()}\n")
    assert run(database_url, "upgrade").stdout == f"database is current ({migrate.head()})\n"
    assert run(database_url, "current").exit_code == 0


def test_programs_read_json(database_url: str) -> None:
    before = json.loads(run(database_url, "current", "--json").stdout)
    assert (before["revision"], before["needed"], before["current"]) == (None, migrate.head(), False)
    assert json.loads(run(database_url, "upgrade", "--json").stdout) == {
        "before": None,
        "revision": migrate.head(),
        "changed": True,
        "newer": False,
    }
    after = json.loads(run(database_url, "current", "--json").stdout)
    assert after["dialect"] == database_url.partition(":")[0].partition("+")[0]
    assert after["current"] is True


def test_an_empty_database_names_the_command(database_url: str) -> None:
    assert "this version needs" in run(database_url, "current").stdout
    assert "code-worker db upgrade" in run(database_url, "current").stdout


def test_a_newer_database_is_nothing_to_do(database_url: str) -> None:
    assert run(database_url, "upgrade").exit_code == 0
    with closing(open_store(database_url)) as store:
        newer = text(f"UPDATE {migrate.VERSION_TABLE} SET version_num = 'from_the_future'")
        store.run(lambda session: session.execute(newer))
    upgraded = run(database_url, "upgrade")
    assert upgraded.exit_code == 0
    assert "newer, at revision from_the_future" in upgraded.stdout
    assert "nothing to do" in upgraded.stdout
    assert json.loads(run(database_url, "upgrade", "--json").stdout)["newer"] is True
    shown = run(database_url, "current")
    assert (shown.exit_code, "run `code-worker db upgrade`" in shown.stdout) == (0, False)


def test_another_applications_database_is_an_error_with_a_way_out(database_url: str) -> None:
    with closing(open_store(database_url)) as store:
        for statement in (
            "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)",
            "INSERT INTO alembic_version VALUES ('8f3a1c')",
        ):
            store.run(lambda session, statement=statement: session.execute(text(statement)))
    refused = CliRunner(env={"CODE_WORKER_DATABASE_URL": database_url}).invoke(cli, ["db", "upgrade"])
    # What `main` prints in one line and ends with status 1 for.
    assert isinstance(refused.exception, StoreError)
    assert "another application's database" in str(refused.exception)
    assert run(database_url, "upgrade", "--beside").exit_code == 0


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "postgresql://nobody@nowhere/none"])
def test_the_sql_is_printed_without_a_database(url: str) -> None:
    printed = run(url, "upgrade", "--sql")
    assert printed.exit_code == 0
    assert "CREATE TABLE jobs" in printed.stdout


def test_a_copy_is_taken_and_restored(migrated_sqlite: Path, tmp_path: Path) -> None:
    shutil.copy(migrated_sqlite, tmp_path / "live.db")
    url, copy = f"sqlite:///{tmp_path / 'live.db'}", str(tmp_path / "copy.db")
    (taken,) = [json.loads(run(url, "backup", copy, "--json").stdout)]
    assert (taken["file"], taken["size_bytes"]) == (copy, Path(copy).stat().st_size)
    restored = run(url, "restore", copy)
    assert restored.exit_code == 0
    aside = re.search(r"what was there before is in (\S+)", restored.stdout)
    assert aside is not None
    assert Path(aside[1]).is_file()
    assert json.loads(run(url, "restore", copy, "--json").stdout)["before"] != aside[1]
    assert run(url, "current").exit_code == 0


def test_asking_for_the_revision_makes_no_database(tmp_path: Path) -> None:
    file = tmp_path / "not" / "there.db"
    shown = run(f"sqlite:///{file}", "current")
    assert shown.exit_code == 1
    assert "code-worker db upgrade" in shown.stdout
    assert not file.parent.exists()


def test_a_file_that_is_no_database_is_neither_copied_nor_restored(
    migrated_sqlite: Path, tmp_path: Path, bare_cli: Cli
) -> None:
    (tmp_path / "garbage.db").write_bytes(b"no database at all " * 100)
    bare_cli.env["CODE_WORKER_DATABASE_URL"] = f"sqlite:///{tmp_path / 'garbage.db'}"
    for words in (("backup", str(tmp_path / "copy.db")), ("restore", str(migrated_sqlite))):
        ran = bare_cli("db", *words)
        assert (ran.status, ran.stderr.count("\n")) == (1, 1)
        assert "file is not a database" in ran.stderr


def test_a_user_without_rights_gets_one_line_from_each_command(
    postgres_server: PostgresServer, postgres_store: Store, bare_cli: Cli
) -> None:
    postgres_server._sql("CREATE ROLE sees_nothing LOGIN")
    url = postgres_store.engine.url.set(username="sees_nothing").render_as_string(hide_password=False)
    bare_cli.env["CODE_WORKER_DATABASE_URL"] = url
    try:
        for words in (
            *(("jobs", "list"), ("verdicts", "list"), ("labels", "list"), ("db", "current"), ("db", "upgrade")),
            *(("enqueue", "s3://b/a.png"), ("erase", "--tenant", "acme", "--yes"), ("releases", "list")),
        ):
            ran = bare_cli(*words)
            assert (ran.status, ran.stderr.count("\n")) == (1, 1), (words, ran.stderr)
            assert "may not do this" in ran.stderr
    finally:
        postgres_server._sql("DROP ROLE sees_nothing")
