"""`code-worker db`, as a person or a deployment runs it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from code_worker.cli.main import cli
from code_worker.store import migrate


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
    }
    after = json.loads(run(database_url, "current", "--json").stdout)
    assert after["dialect"] == database_url.partition(":")[0].partition("+")[0]
    assert after["current"] is True


def test_an_empty_database_names_the_command(database_url: str) -> None:
    assert "this version needs" in run(database_url, "current").stdout
    assert "code-worker db upgrade" in run(database_url, "current").stdout


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "postgresql://nobody@nowhere/none"])
def test_the_sql_is_printed_without_a_database(url: str) -> None:
    printed = run(url, "upgrade", "--sql")
    assert printed.exit_code == 0
    assert "CREATE TABLE jobs" in printed.stdout
