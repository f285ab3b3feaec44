"""`code-worker db`, as a person or a deployment runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text

from code_worker.cli.main import cli
from code_worker.errors import StoreError
from code_worker.store import migrate, workers
from code_worker.store.engine import Store, open_store
from tests.cli.conftest import Cli
from tests.cli.ledger_rows import judged
from tests.servers import PostgresServer


def run(url: str, *arguments: str) -> Result:
    return CliRunner(env={"CODE_WORKER_DATABASE_URL": url}).invoke(cli, ["db", *arguments], catch_exceptions=False)


def set_revision(url: str, revision: str) -> None:
    with closing(open_store(url)) as store:
        change = text(f"UPDATE {migrate.VERSION_TABLE} SET version_num = '{revision}'")
        store.run(lambda session: session.execute(change))


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
    set_revision(database_url, "from_the_future")
    upgraded = run(database_url, "upgrade")
    assert upgraded.exit_code == 0
    assert "newer, at revision from_the_future" in upgraded.stdout
    assert "nothing to do" in upgraded.stdout
    assert json.loads(run(database_url, "upgrade", "--json").stdout)["newer"] is True
    shown = run(database_url, "current")
    assert (shown.exit_code, "run `code-worker db upgrade`" in shown.stdout) == (0, False)


def test_a_database_from_before_the_first_release_does_not_serve(database_url: str) -> None:
    assert run(database_url, "upgrade").exit_code == 0
    set_revision(database_url, "2026_11_28_audit")
    shown = run(database_url, "current")
    assert (shown.exit_code, "before the first release, and cannot be upgraded" in shown.stdout) == (1, True)
    assert json.loads(run(database_url, "current", "--json").stdout)["newer"] is False


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


def copied(cli: Cli, target: Path) -> str:
    assert cli("db", "backup", str(target)).status == 0
    return str(target)


def test_a_restore_names_each_erasure_that_it_undoes_and_how_to_ask_again(
    sqlite_cli: Cli, sqlite_store: Store, tmp_path: Path
) -> None:
    """A receipt tells nobody what it erased; the copy that is restored has the names."""
    store, erased = sqlite_store, ["erase", "--yes", "--json"]
    early = judged(store, "s3://b/early.jpg", 0.9, tenant="early")
    sqlite_cli(*erased, "--job", early)
    job = judged(store, "s3://b/a.jpg", 0.9)
    judged(store, "s3://b/b.jpg", 0.9, tenant="a cme")
    copy = copied(sqlite_cli, tmp_path / "copy.db")
    later = judged(store, "s3://b/later.jpg", 0.9, tenant="later")
    asked = [
        *(("--job", job), ("--tenant", "a cme"), ("--tenant", "later"), ("--sha256", "ab" * 32)),
        ("--before", "2000-01-31"),
    ]
    judged(store, "s3://b/c.jpg", 0.9)
    receipts = [sqlite_cli(*erased, *words, "--why", "asked for").records[0] for words in asked]
    assert later not in str(receipts)
    ran = sqlite_cli("db", "restore", copy, "--json")
    assert ran.status == 0, ran.stderr
    undone = {one["id"]: one for one in ran.records[0]["undone"]}
    assert list(undone) == [one["id"] for one in receipts]
    commands = [one["again"] for one in undone.values()]
    assert commands == [
        [f"code-worker erase --job {job} --why 'asked for'"],
        ["code-worker erase --tenant 'a cme' --why 'asked for'"],
        [],
        [f"code-worker erase --sha256 {'ab' * 32} --why 'asked for'"],
        ["code-worker erase --before 2000-01-31T00:00:00+00:00 --why 'asked for'"],
    ]
    assert {one["scope"] for one in undone.values()} == {one["scope"] for one in receipts}


def test_a_restore_says_in_words_what_it_undoes_and_what_is_left_beside(
    sqlite_cli: Cli, sqlite_store: Store, tmp_path: Path
) -> None:
    copy = copied(sqlite_cli, tmp_path / "empty.db")
    full = judged(sqlite_store, "s3://b/a.jpg", 0.9)
    assert "undone" not in sqlite_cli("db", "restore", copied(sqlite_cli, tmp_path / "full.db")).stdout
    sqlite_cli("erase", "--job", full, "--yes")
    said = sqlite_cli("db", "restore", str(tmp_path / "full.db")).stdout
    assert "undone are these erasures, asked for since the copy was made:" in said
    assert f"    code-worker erase --job {full}\n" in said
    assert "(delete it later: it keeps what is erased from now on" in said
    assert (
        "next: code-worker db upgrade, erase again, by the commands printed here (1 erasure), then start the workers"
        in said
    )
    sqlite_cli("erase", "--job", full, "--yes")
    assert "nothing that it erased is in the copy" in sqlite_cli("db", "restore", copy).stdout


def test_an_erasure_names_copies_that_a_restore_left_and_that_may_hold_it(
    sqlite_cli: Cli, sqlite_store: Store, tmp_path: Path
) -> None:
    job = judged(sqlite_store, "s3://b/a.jpg", 0.9)
    restored = sqlite_cli("db", "restore", copied(sqlite_cli, tmp_path / "copy.db"), "--json").records[0]
    erased = sqlite_cli("erase", "--job", job, "--yes", "--json")
    assert erased.stderr.splitlines()[-1] == (
        f"{restored['before']} was left by `db restore` and may still hold what was erased: delete it"
    )
    (receipt,) = erased.records
    assert restored["before"] in sqlite_cli("erasures", "show", receipt["id"]).stderr
    # One that knows of the finished erasure holds none of it.
    knows = sqlite_cli("db", "restore", copied(sqlite_cli, tmp_path / "after.db"), "--json").records[0]["before"]
    assert knows not in sqlite_cli("erasures", "show", receipt["id"]).stderr
    Path(restored["before"]).unlink()
    assert sqlite_cli("erasures", "show", receipt["id"]).stderr == ""


def test_a_restore_is_refused_while_parts_are_heard_of(sqlite_cli: Cli, sqlite_store: Store, tmp_path: Path) -> None:
    copy = copied(sqlite_cli, tmp_path / "copy.db")
    job = judged(sqlite_store, "s3://b/a.jpg", 0.9)
    for owner, info in (("one", {}), ("two", {"role": "trainer"})):
        sqlite_store.run(partial(workers.beat, owner=owner, version="1", host="h", pid=7, info=info))
    ran = sqlite_cli("db", "restore", copy)
    assert (ran.status, ran.stderr.count("\n")) == (1, 1)
    assert "in use by worker h:7, trainer h:7: stop them first, or say --force" in ran.stderr
    assert sqlite_cli("jobs", "show", job).status == 0
    assert list(tmp_path.glob("**/*.before-*")) == []
    assert sqlite_cli("db", "restore", copy, "--force").status == 0
    assert sqlite_cli("jobs", "show", job).status == 1


def test_the_database_itself_and_what_is_no_file_are_no_copies(
    sqlite_cli: Cli, sqlite_store: Store, tmp_path: Path
) -> None:
    file = Path(sqlite_store.url.removeprefix("sqlite:///"))
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    said = {str(one): "is the database itself" for one in (file, tmp_path / "link", tmp_path / "hard")}
    for source, why in {**said, "/dev/zero": "no regular file", str(tmp_path / "pipe"): "no regular file"}.items():
        ran = sqlite_cli("db", "restore", source)
        assert (ran.status, ran.stderr.count("\n")) == (2, 1), (source, ran.stderr)
        assert f"{source} " in ran.stderr
        assert why in ran.stderr


@pytest.mark.parametrize("target", ["/proc/x.db", "/proc/none/x.db", "/dev/null/x.db"])
def test_a_place_that_no_copy_can_be_written_to_is_named_as_it_was_given(
    sqlite_cli: Cli, sqlite_store: Store, target: str
) -> None:
    ran = sqlite_cli("db", "backup", target)
    assert (ran.status, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(f"code-worker: the database cannot be copied to {target}: ")
    assert ".x.db-" not in ran.stderr


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
