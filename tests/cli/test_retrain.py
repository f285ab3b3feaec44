"""Learning from the shell: plans, runs, schedules, and exit statuses."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from code_worker.settings import Settings
from code_worker.store.engine import Store
from code_worker.store.ids import uuid7
from code_worker.store.learning import runs
from code_worker.store.learning import runs as schedule
from code_worker.store.learning.runs import RunMetrics
from code_worker.wire import TRAIN_QUEUE
from tests.cli.conftest import Cli
from tests.servers import RedisServer
from tests.training.learning import (
    NEW,
    REAL,
    build_champion,
    label,
    label_world,
    learning_settings,
    pictures,
    promote_champion,
)


@pytest.fixture(scope="module")
def champion_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_champion(tmp_path_factory.mktemp("champion") / "release")


@pytest.fixture
def settings(sqlite_cli: Cli) -> Settings:
    """The same that the command line gets."""
    sqlite_cli.env |= {
        "CODE_WORKER_SCHEDULE__MIN_HOLDOUT": "8",
        "CODE_WORKER_GATE__MAX_REGRESSION": "0.3",
        "CODE_WORKER_GATE__ERROR": "0.2",
        "CODE_WORKER_DEVICE": "cpu",
    }
    return learning_settings(Path(sqlite_cli.env["CODE_WORKER_DATA_DIR"]))


@pytest.fixture
def champion(settings: Settings, sqlite_store: Store, champion_dir: Path) -> str:
    return promote_champion(settings, sqlite_store, champion_dir)


def test_a_dry_run_prints_the_snapshot_and_the_plan_and_writes_nothing(
    sqlite_cli: Cli, settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store, real=12, old=6, new=6)
    label(settings, sqlite_store, pictures(REAL, 1), "fake", by="bob")
    said = sqlite_cli("retrain", "--dry-run")
    assert said.status == 0
    assert champion in said.stdout
    assert "1 image, decided by the rule" in said.stdout
    assert "would wait: 11 new real images, 20 are needed" in said.stdout
    (plan,) = sqlite_cli("refit", "--dry-run", "--json").records
    assert sum(plan["snapshot"][part]["real"] for part in ("train", "validation", "holdout")) == 11
    assert plan["training"] is None
    label(settings, sqlite_store, pictures(REAL, 3, first=500), "real", by="bob")
    capped = sqlite_cli("retrain", "--dry-run", env={"CODE_WORKER_LABELS__MAX_SHARE": "0.5"})
    assert "over a labeller's share" in capped.stdout
    assert " 0 over a labeller's share" not in capped.stdout
    assert sqlite_store.run(runs.list_runs) == []
    assert sqlite_cli("retrain", "--dry-run", "--enqueue").status == 2


def test_a_refit_runs_here_and_says_what_became_of_it(
    sqlite_cli: Cli, settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    done = sqlite_cli("refit")
    assert done.status == 0, done.stderr
    assert "promoted r-" in done.stdout
    assert "better on all images, clean" in done.stdout
    assert "  heads fitted: knn (n_neighbors 1, weights uniform, metric cosine), linear (C 0.316, " in done.stdout
    again = sqlite_cli("refit", "--json")
    assert (again.status, again.records[0]["state"]) == (0, "skipped")
    assert "nothing was labelled since run" in sqlite_cli("refit", "--dry-run").stdout
    assert "nothing was labelled since run" not in sqlite_cli("retrain", "--dry-run").stdout, "it was a refit"
    forced = sqlite_cli("refit", "--force")
    assert forced.status == 1
    assert "is not promoted; the champion stays" in forced.stdout
    newest, *_, first = sqlite_cli("runs", "list", "--json").records
    assert (newest["state"], first["state"]) == ("rejected", "promoted")
    shown = sqlite_cli("runs", "show", first["id"])
    assert NEW in shown.stdout
    assert "768px_q60" in shown.stdout
    assert champion in shown.stdout


def test_a_run_that_fails_ends_with_status_1_and_its_reason(
    sqlite_cli: Cli, settings: Settings, champion: str
) -> None:
    failed = sqlite_cli("refit")
    assert failed.status == 1
    assert "failed; the champion stays" in failed.stdout
    assert "no labelled image to learn from" in failed.stdout
    assert "Traceback" not in failed.stderr


def test_a_run_under_way_elsewhere_is_left_alone(sqlite_cli: Cli, settings: Settings, sqlite_store: Store) -> None:
    other = uuid7()
    sqlite_store.run(
        lambda session: runs.start(
            session, id=other, kind="retrain", by="a", owner="elsewhere:1", config={}, base_release=None
        )
    )
    refused = sqlite_cli("refit")
    assert refused.status == 1
    assert f"another run is under way: retrain {other}" in refused.stderr


@pytest.mark.parametrize(
    ("words", "task", "asked"),
    [
        (("retrain", "--force"), "code_worker.retrain", {"force": True}),
        (("refit",), "code_worker.refit", {}),
        (
            ("refit", "--head", "knn", "--challenge"),
            "code_worker.refit",
            {"heads": {"knn": {}}, "challenge": True},
        ),
    ],
)
def test_enqueue_leaves_it_to_the_trainer_and_sends_only_what_is_asked_for(
    sqlite_cli: Cli,
    settings: Settings,
    redis_server: RedisServer,
    words: tuple[str, ...],
    task: str,
    asked: dict[str, Any],
) -> None:
    sqlite_cli.env["CODE_WORKER_BROKER_URL"] = redis_server.url
    assert "queued for the trainer" in sqlite_cli(*words, "--enqueue").stdout
    with redis.Redis.from_url(redis_server.url) as server:
        (message,) = (json.loads(each) for each in server.lrange(f"cw:{TRAIN_QUEUE}", 0, -1))
    assert message["headers"]["task"] == task
    _, arguments, _ = json.loads(base64.b64decode(message["body"]))
    assert arguments.pop("by")
    assert arguments == asked, "an older trainer knows no other fields"


def test_runs_are_shown_with_their_curves(cli: Cli, store: Store) -> None:
    run_id = uuid7()

    def write(session):  # type: ignore[no-untyped-def]  # SQLAlchemy's session
        run = runs.start(session, id=run_id, kind="retrain", by="alice", owner="a:1", config={}, base_release=None)
        runs.note(session, run.lease, report={"gate": {"learned": {"bob": 2, "eve": 1}}})
        runs.add_metrics(session, run.lease, [RunMetrics(1, 10, {"loss": 3.25, "linear": 0.5, "svm/clean/mean": 1})])

    assert "no run yet" in cli("runs", "list").stdout
    store.run(write)
    assert run_id in cli("runs", "list", "--state", "running").stdout
    assert cli("runs", "list", "--kind", "refit", "--json").records == []
    shown = cli("runs", "show", run_id).stdout
    assert "under way, started" in shown
    assert "3.25" in shown
    assert "3 images of the hold-out that a release learned from" in shown
    (record,) = cli("runs", "show", run_id, "--json").records
    assert record["metrics"][0]["metrics"]["svm/clean/mean"] == 1
    missing = cli("runs", "show", uuid7())
    assert (missing.status, "code-worker runs list" in missing.stderr) == (1, True)


def test_schedules_are_listed_with_their_next_and_last_times(cli: Cli, store: Store) -> None:
    unset = cli("schedule", "list").stdout
    assert "not set: CODE_WORKER_SCHEDULE__RETRAIN" in unset
    cli.env["CODE_WORKER_SCHEDULE__RETRAIN"] = "0 3 * * sun"
    run_id = uuid7()

    def fire(session):  # type: ignore[no-untyped-def]  # SQLAlchemy's session
        run = runs.start(session, id=run_id, kind="retrain", by="a", owner="a:1", config={}, base_release=None)
        schedule.take_slot(session, "retrain", run.created_at, run_id=run_id, outcome="started")
        runs.finish(session, run.lease, "rejected")

    store.run(fire)
    retrain, refit, calibrate = cli("schedule", "list", "--json").records
    assert (calibrate["schedule"], calibrate["cron"], calibrate["next"]) == ("calibrate", None, [])
    assert (retrain["cron"], retrain["outcome"], retrain["run"]) == ("0 3 * * sun", "rejected", run_id)
    assert len(retrain["next"]) == 3
    assert all("T03:00:00+00:00" in at for at in retrain["next"])
    assert (refit["cron"], refit["next"], refit["last"]) == (None, [], None)
    assert run_id in cli("schedule", "list").stdout


def test_a_time_that_nobody_took_is_said_to_be_overdue(cli: Cli, store: Store) -> None:
    before = datetime.now(UTC).replace(microsecond=0) - timedelta(days=3)
    hour = (datetime.now(UTC) - timedelta(hours=2)).hour
    cli.env["CODE_WORKER_SCHEDULE__REFIT"] = f"0 {hour} * * *"
    store.run(lambda session: schedule.take_slot(session, "refit", before, run_id=uuid7(), outcome="started"))
    listed = cli("schedule", "list")
    assert "refit was due at" in listed.stderr
    assert "does a `code-worker trainer` run?" in listed.stderr
    assert cli("schedule", "list", "--json").records[1]["overdue"] is not None


def test_a_wrong_cron_line_is_one_clear_line(bare_cli: Cli) -> None:
    bare_cli.env["CODE_WORKER_SCHEDULE__REFIT"] = "every sunday"
    wrong = bare_cli("schedule", "list")
    assert wrong.status == 2
    assert "CODE_WORKER_SCHEDULE__REFIT: 'every sunday' is no cron line" in wrong.stderr


def test_without_a_database_the_commands_say_how_to_get_one(bare_cli: Cli) -> None:
    for words in (("retrain",), ("refit", "--dry-run"), ("runs", "list")):
        result = bare_cli(*words)
        assert (result.status, "no database" in result.stderr) == (2, True)
    assert bare_cli("schedule", "list").status == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--head", "knn"), "say --head with --challenge"),
        (("--options", "{}", "--challenge"), "--options belong to one head"),
        (("--head", "knn", "--head", "svm", "--options", "{}", "--challenge"), "--options belong to one head"),
    ],
)
def test_a_refit_of_one_head_is_asked_for_whole(sqlite_cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    ran = sqlite_cli("refit", *arguments)
    assert ran.status == 2
    assert said in ran.stderr


def test_a_dry_run_says_which_head_would_be_fitted(sqlite_cli: Cli) -> None:
    asked = ("refit", "--head", "knn", "--options", '{"n_neighbors": 3}', "--challenge", "--dry-run", "--json")
    (plan,) = sqlite_cli(*asked).records
    assert (plan["heads"], plan["missing"]) == (["knn"], [])
    unknown = sqlite_cli("refit", "--head", "kn", "--challenge", "--dry-run")
    assert unknown.status == 2
    assert "unknown head 'kn'; known: knn, linear, svm" in unknown.stderr
