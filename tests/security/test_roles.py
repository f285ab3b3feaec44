"""Who may do what: a role reaches what it should and nothing above, and what is refused changes nothing."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import pytest

from code_worker.data.erasure.erase import Eraser
from code_worker.data.label_files.label_import import import_rows
from code_worker.data.label_files.label_rows import Row
from code_worker.errors import ConfigurationError, NotAllowedError
from code_worker.plugins import Plugins
from code_worker.releases.artifacts import LocalArtifacts
from code_worker.releases.registry import Registry
from code_worker.roles import Role, current_user, require, role_of
from code_worker.settings import RoleSettings, Settings
from code_worker.store import audit
from code_worker.store.engine import Store
from code_worker.store.erasure.scopes import Scope
from code_worker.store.policies import put_policy
from code_worker.training.learner import Learner
from code_worker.worker.judging.rescore_run import rescore
from tests.cli.conftest import Cli
from tests.data.label_acts import Place

TEAM = RoleSettings(labellers=("lea",), reviewers=("rob",), operators=("olga",))


def entries(store: Store) -> int:
    return len(store.run(lambda session: audit.list_entries(session, limit=100), write=False))


def test_while_no_role_lists_anybody_everybody_may_do_everything() -> None:
    assert role_of(RoleSettings(), "anybody") is Role.OPERATOR


@pytest.mark.parametrize(
    ("actor", "role"), [("lea", Role.LABELLER), ("rob", Role.REVIEWER), ("olga", Role.OPERATOR), ("eve", None)]
)
def test_a_role_includes_those_below_and_none_above(actor: str, role: Role | None) -> None:
    assert role_of(TEAM, actor) is role
    for wanted in Role:
        if role is not None and role >= wanted:
            require(TEAM, actor, wanted, "do it")
        else:
            with pytest.raises(NotAllowedError, match=f"{actor} has .* may not do it: .* {wanted.name.lower()}"):
                require(TEAM, actor, wanted, "do it")


def test_a_star_gives_a_role_to_everybody_and_takes_none_from_anybody() -> None:
    roles = RoleSettings(labellers=("*",), operators=("olga",))
    assert role_of(roles, "anybody") is Role.LABELLER
    assert role_of(roles, "olga") is Role.OPERATOR


def test_a_refusal_is_wrong_use() -> None:
    assert issubclass(NotAllowedError, ConfigurationError)


def test_the_user_is_the_systems_not_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "olga")
    assert current_user() == pwd.getpwuid(os.getuid()).pw_name != "olga"


@pytest.fixture
def place(sqlite_store: Store, tmp_path: Path) -> Place:
    made = Place(tmp_path, sqlite_store)
    made.settings = made.settings.model_copy(update={"roles": TEAM})
    made.labeller = type(made.labeller)(made.settings, sqlite_store)
    return made


def test_labelling_takes_a_labeller_and_somebody_elses_name_a_reviewer(place: Place) -> None:
    path = place.image("a.png")
    with pytest.raises(NotAllowedError, match="eve has no role and may not label"):
        place.labeller.label(path, "fake", by="eve")
    with pytest.raises(NotAllowedError, match="in the name of rob"):
        place.labeller.label(path, "fake", by="rob", actor="lea")
    assert (place.statements(), place.copies(), entries(place.store)) == ([], set(), 0)
    assert place.labeller.label(path, "fake", by="lea").new
    assert place.labeller.label(path, "real", by="lea", actor="rob").new


def test_settling_a_contradiction_takes_a_reviewer(place: Place) -> None:
    path = place.image("a.png")
    place.labeller.label(path, "fake", by="lea")
    with pytest.raises(NotAllowedError, match="lea has the role labeller and may not settle"):
        place.labeller.label(path, "real", by="lea", source="review")
    assert place.labeller.label(path, "real", by="rob", source="review").new
    assert [said.source for said in place.statements()] == ["api", "review"]
    last = place.store.run(audit.last, write=False)
    assert last is not None
    assert (last.actor, last.action) == ("rob", "label.settle")


def test_importing_files_of_labels_takes_a_reviewer(place: Place) -> None:
    rows = [Row(place="line 1", label="fake", uri=place.image("a.png"))]
    with pytest.raises(NotAllowedError, match="lea has the role labeller and may not import labels"):
        list(import_rows(place.labeller, rows, name="a.csv", by="lea", threads=1))
    assert (place.statements(), entries(place.store)) == ([], 0)
    assert [done.new for done in import_rows(place.labeller, rows, name="a.csv", by="rob", threads=1)] == [1]


def test_what_judges_is_changed_by_operators_alone(sqlite_store: Store, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, roles=TEAM)
    registry = Registry(sqlite_store, LocalArtifacts(tmp_path / "releases"), Plugins(), TEAM)
    refused = {
        "import a release": lambda by: registry.import_(str(tmp_path), by=by),
        "sign a release": lambda by: registry.sign("r-0", by=by),
        "promote a release": lambda by: registry.promote("r-0", by=by),
        "roll back": lambda by: registry.rollback(by=by),
        "choose a challenger": lambda by: registry.challenge("r-0", by=by),
        "withdraw the challenger": lambda by: registry.withdraw(by=by),
        "set thresholds": lambda by: put_policy(settings, sqlite_store, by=by, low=0.4, high=0.6),
        "start a refit": lambda by: Learner(settings, sqlite_store).learn("refit", by=by),
        "start a retrain": lambda by: Learner(settings, sqlite_store).learn("retrain", by=by),
        "judge history again": lambda by: rescore(settings, sqlite_store, None, by=by),
        "erase": lambda by: Eraser(settings, sqlite_store).erase(Scope(tenant="acme"), by=by),
    }
    for doing, act in refused.items():
        for actor in ("rob", "lea", "eve"):
            with pytest.raises(NotAllowedError, match=f"{actor} has .* and may not {doing}"):
                act(actor)
    assert entries(sqlite_store) == 0
    assert put_policy(settings, sqlite_store, by="olga", low=0.4, high=0.6).version == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("enqueue", "s3://uploads/a.jpg"),
        ("jobs", "retry", "--state", "quarantined", "--yes"),
        ("verdicts", "list"),
        ("audit", "list"),
        ("db", "upgrade"),
    ],
)
def test_what_the_database_and_the_broker_allow_takes_no_role(sqlite_cli: Cli, arguments: tuple[str, ...]) -> None:
    sqlite_cli.env["CODE_WORKER_ROLES__OPERATORS"] = json.dumps(["olga"])
    done = sqlite_cli(*arguments, env={"CODE_WORKER_BROKER_URL": "memory://"})
    assert (done.status, "role" in done.stderr) == (0, False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("policies", "set", "--low", "0.4", "--high", "0.6"),
        ("releases", "import", "somewhere"),
        ("releases", "rollback"),
        ("refit",),
        ("refit", "--enqueue"),
        ("rescore", "--since", "1d"),
        ("calibrate", "somewhere", "--max-fpr", "0.01"),
        ("label", "/nowhere/a.png", "real"),
    ],
)
def test_commands_act_as_the_user_who_runs_them(sqlite_cli: Cli, arguments: tuple[str, ...]) -> None:
    sqlite_cli.env["CODE_WORKER_ROLES__OPERATORS"] = json.dumps(["olga"])
    done = sqlite_cli(*arguments, env={"USER": "olga", "LOGNAME": "olga"})
    assert (done.status, done.stdout) == (2, "")
    assert f"{current_user()} has no role and may not" in done.stderr


def test_what_a_run_would_learn_from_may_be_read_without_a_role(sqlite_cli: Cli) -> None:
    sqlite_cli.env["CODE_WORKER_ROLES__OPERATORS"] = json.dumps(["olga"])
    planned = sqlite_cli("refit", "--dry-run", "--json")
    assert planned.status == 0
    assert planned.records[0]["snapshot"]["holdout"]["generators"] == {}
