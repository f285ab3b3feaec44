from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import SecretStr

from code_worker.doctor import examine
from code_worker.doctor.check import Check, Status
from code_worker.store import policies, releases
from code_worker.store.engine import Session, Store
from tests.cli.conftest import Cli, Ran

Run = Callable[..., Ran]


@pytest.fixture
def run(cli: Cli) -> Run:
    return lambda *words: cli("policies", *words)


def test_without_a_policy_the_published_decision_is_said(run: Run) -> None:
    assert "score >= 0.5 is fake" in run("list").stdout
    assert run("list", "--json").stdout == ""


def test_a_policy_is_set_listed_and_superseded(run: Run) -> None:
    first = run("set", "--tenant", "acme", "--low", "0.2", "--high", "0.9", "--note", "cautious")
    assert "version 1 for tenant acme, every content type: real below 0.2, fake from 0.9" in first.stdout
    run("set", "--content-type", "avatar", "--low", "0.4", "--high", "0.6")
    (again,) = run("set", "--tenant", "acme", "--low", "0.3", "--high", "0.8", "--json").records
    assert (again["version"], again["tenant"], again["content_type"]) == (2, "acme", None)
    rows = run("list", "--json").records
    assert {(row["tenant"], row["content_type"], row["low"], row["version"]) for row in rows} == {
        ("acme", None, 0.3, 2),
        (None, "avatar", 0.4, 1),
    }
    history = run("list", "--history", "--tenant", "acme", "--json").records
    assert [row["note"] for row in history] == ["", "cautious"]
    table = run("list").stdout
    assert "acme" in table
    assert "(all)" in table


@pytest.mark.parametrize(
    "words",
    [
        ("set", "--low", "0.9", "--high", "0.1"),
        ("set", "--low", "-0.1", "--high", "0.5"),
        ("set", "--low", "0.5", "--high", "nan"),
        ("set", "--low", "0.5"),
        ("set", "--tenant", "", "--low", "0.5", "--high", "0.5"),
        ("list", "--tenant", "acme"),
    ],
)
def test_wrong_use_changes_nothing(run: Run, words: tuple[str, ...]) -> None:
    assert run(*words).status == 2
    assert run("list", "--json").stdout == ""


def test_a_head_that_the_champion_lacks_is_refused(run: Run, store: Store) -> None:
    heads = {"heads": {"linear": {}}}

    def promote(session: Session) -> None:
        releases.add(
            session,
            id="r-0",
            manifest_sha256="0" * 64,
            location="",
            manifest=heads,
            source="",
            by="ann",
        )
        releases.move_alias(session, "champion", "r-0", by="test", reason="")

    assert run("set", "--head", "knn", "--low", "0.5", "--high", "0.5").status == 0, "no champion, no check"
    store.run(promote)
    assert run("set", "--head", "linear", "--low", "0.5", "--high", "0.5").status == 0
    refused = run("set", "--head", "knn", "--low", "0.5", "--high", "0.5")
    assert refused.status == 2
    assert "unknown head 'knn'; known: linear" in refused.stderr


def test_a_policy_that_was_calibrated_on_another_release_is_marked(run: Run, store: Store) -> None:
    def happen(session: Session) -> None:
        for name in ("r-1", "r-2"):
            facts = {"location": "", "manifest": {"heads": {}}, "source": "", "by": "ann"}
            releases.add(session, id=name, manifest_sha256=name, **facts)
        releases.move_alias(session, "champion", "r-1", by="test", reason="")
        policies.put(session, low=0.2, high=0.8, by="ann", tenant="acme", release_id="r-1")
        policies.put(session, low=0.2, high=0.8, by="ann")

    def doctor() -> Check:
        (found,) = examine(["policies"], database_url=SecretStr(store.url))
        return found

    store.run(happen)
    assert (doctor().status, doctor().message[:10]) == (Status.OK, "2 in force")
    assert "stale" not in run("list").stdout + run("list").stderr
    store.run(lambda session: releases.move_alias(session, "champion", "r-2", by="test", reason=""))
    marked = run("list")
    assert "r-1 (stale)" in marked.stdout
    assert "the champion is r-2; draw them anew with `code-worker calibrate --after-promote`" in marked.stderr
    rows = {row["tenant"]: (row["release_id"], row["stale"]) for row in run("list", "--json").records}
    assert rows == {None: (None, False), "acme": ("r-1", True)}
    assert doctor().status is Status.WARN
    assert doctor().message == "tenant acme, every content type: calibrated on r-1, the champion is r-2"
    assert "code-worker calibrate --after-promote" in doctor().hint


def test_without_a_database_the_command_says_how_to_get_one(bare_cli: Cli) -> None:
    result = bare_cli("policies", "list")
    assert result.status == 2
    assert "no database" in result.stderr
