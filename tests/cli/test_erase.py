from __future__ import annotations

import json

import pytest

from code_worker.store import jobs
from code_worker.store.engine import Store
from tests.cli.conftest import Cli
from tests.cli.ledger_rows import judged

SHA = "ab" * 32


def test_a_job_is_erased_and_only_who_knows_it_can_ask(cli: Cli, store: Store) -> None:
    job_id = judged(store, "s3://b/a.jpg", 0.9, tenant="acme")
    (planned,) = cli("erase", "--job", job_id, "--dry-run", "--json").records
    assert (planned["jobs"], planned["images"], planned["releases"]) == (1, 1, {})
    assert store.run(lambda session: jobs.get(session, job_id)) is not None
    (receipt,) = cli("erase", "--job", job_id, "--yes", "--why", "asked by its owner", "--json").records
    assert (receipt["state"], receipt["scope"], receipt["why"]) == ("done", "job", "asked by its owner")
    assert receipt["counts"]["verdicts"] == 1
    assert job_id not in json.dumps(receipt)
    assert cli("erasures", "check", "--job", job_id, "--json").records == [receipt]
    assert cli("erasures", "check", "--sha256", SHA.upper()).status == 0
    assert cli("erasures", "check", "--tenant", "acme").status == 1
    assert cli("erasures", "list", "--json").records == [receipt]
    shown = cli("erasures", "show", receipt["id"]).stdout
    assert "asked by its owner" in shown
    assert cli("erase", "--resume").stdout == "0 erasures were left, and are finished\n"


def test_an_erasure_in_words_says_what_went(cli: Cli, store: Store) -> None:
    judged(store, "s3://b/a.jpg", 0.9, tenant="acme")
    ran = cli("erase", "--tenant", "acme", "--dry-run")
    assert "jobs" in ran.stdout
    ran = cli("erase", "--tenant", "acme", "--yes")
    assert (ran.status, ran.stdout.split()[1]) == (0, "erased")
    assert "acme" not in ran.stdout
    assert "last look" in ran.stdout
    assert "0 rows and copies left" in ran.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--job", "0198c5a2-7f31-7abc-9def-0123456789ab", "--tenant", "a"),
        ("--sha256", "xyz"),
        ("--resume", "--tenant", "a"),
    ],
)
def test_no_scope_two_scopes_and_a_hash_that_is_none_are_refused(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli("erase", *arguments).status == 2
    assert cli("erasures", "check").status == 2


def test_without_a_terminal_nothing_is_erased_unless_somebody_says_yes(cli: Cli, store: Store) -> None:
    job_id = judged(store, "s3://b/a.jpg", 0.9, tenant="acme")
    ran = cli("erase", "--tenant", "acme")
    assert (ran.status, "say --yes" in ran.stderr) == (2, True)
    assert store.run(lambda session: jobs.get(session, job_id)) is not None


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tenant", "acne"), ("--job", "0198c5a2-7f31-7abc-9def-0123456789ab"), ("--sha256", "cd" * 32)],
)
def test_what_nobody_knows_is_an_error_and_no_receipt(cli: Cli, store: Store, option: str, value: str) -> None:
    judged(store, "s3://b/a.jpg", 0.9, tenant="acme")
    for more in ("--yes", "--dry-run"):
        ran = cli("erase", option, value, more)
        assert (ran.status, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
        assert "nothing is kept of the " in ran.stderr
    assert cli("erasures", "list", "--json").records == []


def test_a_script_that_erases_again_gets_the_receipt_of_then_and_status_0(cli: Cli, store: Store) -> None:
    judged(store, "s3://b/a.jpg", 0.9, tenant="acme")
    first = cli("erase", "--tenant", "acme", "--yes", "--json")
    again = cli("erase", "--tenant", "acme", "--yes", "--json")
    assert (again.status, again.records) == (0, first.records)
    assert "it was erased before, and nothing is kept of it" in again.stderr
    assert cli("erasures", "list", "--json").records == first.records
