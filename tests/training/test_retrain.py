"""Whole runs in this process, with the real trainer: what they end as, and what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from code_worker.cli.learning.runs import say_run
from code_worker.errors import ConfigurationError, RunActiveError, RunLostError, RunStoppedError
from code_worker.settings import Settings
from code_worker.store.engine import Store
from code_worker.store.learning import runs
from code_worker.training import snapshot as snapshots
from code_worker.training.fitting.job import TRAIN_FILE, Item, TrainingJob, read_items, write_job
from code_worker.training.learner import DueSlot, Learner
from tests.fork_server import forking_python
from tests.store.acts import slots
from tests.training.learning import (
    NEW,
    REAL,
    build_champion,
    label,
    label_world,
    learning_settings,
    pictures,
    promote_champion,
    registry_of,
)

Listen = Callable[[str, Mapping[str, Any]], None]
SLOT = DueSlot("refit", datetime(2026, 11, 22, 3, tzinfo=UTC))


@pytest.fixture(autouse=True)
def forked_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training processes are copies of one that has loaded torch."""
    monkeypatch.setattr(sys, "executable", forking_python())


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests but those that lose them keep their images: writing a file durably takes its time."""
    return tmp_path_factory.mktemp("dataset")


@pytest.fixture
def settings(tmp_path: Path, copies: Path) -> Settings:
    return learning_settings(tmp_path / "data").model_copy(update={"datasets": str(copies)})


@pytest.fixture(scope="module")
def champion_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_champion(tmp_path_factory.mktemp("champion") / "release")


@pytest.fixture
def champion(settings: Settings, sqlite_store: Store, champion_dir: Path) -> str:
    return promote_champion(settings, sqlite_store, champion_dir)


@pytest.fixture
def own_copies(settings: Settings) -> Settings:
    return settings.model_copy(update={"datasets": None})


def learner(settings: Settings, store: Store, **more: Any) -> Learner:
    return Learner(settings, store, **more)


def run(store: Store, run_id: str) -> runs.Run:
    found = store.run(lambda session: runs.get(session, run_id), write=False)
    assert found is not None
    return found


def alias(settings: Settings, store: Store) -> str | None:
    return registry_of(settings, store).champion()


def test_a_refit_that_is_better_becomes_the_champion(settings: Settings, sqlite_store: Store, champion: str) -> None:
    label_world(settings, sqlite_store)
    ended = learner(settings, sqlite_store).learn("refit", by="alice")
    assert ended is not None
    assert (ended.state, ended.base_release, ended.attempts) == ("promoted", champion, 1)
    assert alias(settings, sqlite_store) == ended.candidate != champion
    loaded = registry_of(settings, sqlite_store).load(str(ended.candidate))
    assert set(loaded.heads) == {"knn", "linear", "svm"}
    assert loaded.encoder_sha256 == registry_of(settings, sqlite_store).load(champion).encoder_sha256
    assert loaded.manifest.evaluation["snapshot"] == ended.snapshot_id
    assert ended.report["gate"]["promote"] is True
    assert ended.report["snapshot"]["holdout"]["generators"][NEW] > 0
    assert not (settings.data_path / "runs" / ended.id / "release").exists()


def test_a_second_run_on_the_same_labels_is_skipped_and_force_runs_it(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    taught = learner(settings, sqlite_store)
    first = taught.learn("refit", by="alice")
    second = taught.learn("refit", by="alice")
    assert first is not None
    assert second is not None
    assert second.state == "skipped"
    assert f"nothing was labelled since run {first.id}, which was promoted" in second.reasons
    third = taught.learn("refit", by="alice", force=True)
    assert third is not None
    assert (third.state, third.reasons[0][:14]) == ("rejected", "nothing gained")
    assert alias(settings, sqlite_store) == first.candidate


def test_too_few_new_labels_are_waited_for(settings: Settings, sqlite_store: Store, champion: str) -> None:
    label_world(settings, sqlite_store, real=12, old=4, new=4)
    ended = learner(settings, sqlite_store).learn("retrain", by="alice")
    assert ended is not None
    assert ended.state == "skipped"
    assert "12 new real images, 20 are needed" in ended.reasons
    assert ended.snapshot_id is None
    assert ended.report["snapshot"]["train"]["real"] > 0


def test_no_label_and_one_class_only_are_recorded_as_failures(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    for images, reason in ((0, "no labelled image to learn from"), (30, "no fake image to learn from")):
        label(settings, sqlite_store, pictures(REAL, images), "real")
        ended = learner(settings, sqlite_store).learn("refit", by="alice")
        assert ended is not None
        assert ended.state == "failed"
        assert ended.reasons[0].startswith(reason)
    assert alias(settings, sqlite_store) == champion


@pytest.mark.parametrize("kind", ["refit", "retrain"])
def test_images_that_are_all_gone_from_storage_fail_the_run(
    own_copies: Settings, sqlite_store: Store, champion: str, kind: str
) -> None:
    label_world(own_copies, sqlite_store)
    shutil.rmtree(own_copies.resolved_datasets)
    ended = learner(own_copies, sqlite_store).learn(kind, by="alice")
    assert ended is not None
    assert ended.state == "failed"
    assert "labelled images cannot be read, one because" in ended.reasons[0]
    assert alias(own_copies, sqlite_store) == champion


def test_some_images_that_are_gone_are_left_out_and_listed(
    own_copies: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(own_copies, sqlite_store)
    lost = sorted(Path(own_copies.resolved_datasets).rglob("*"))
    for path in [path for path in lost if path.is_file()][:5]:
        path.write_bytes(b"rotten")
    ended = learner(own_copies, sqlite_store).learn("refit", by="alice")
    assert ended is not None
    assert ended.state == "promoted"
    assert ended.report["skipped"]["images"] == 5
    assert len(ended.report["skipped"]["some"]) == 5


def test_wrong_labels_are_rejected_by_class(settings: Settings, sqlite_store: Store, champion: str) -> None:
    label_world(settings, sqlite_store, real=120)
    label(settings, sqlite_store, pictures(REAL, 120)[::3], "fake", generator=NEW, by="vandal")
    ended = learner(settings, sqlite_store).learn("refit", by="alice")
    assert ended is not None
    assert ended.state == "rejected"
    assert any("labels of fake images are not to be trusted" in reason for reason in ended.reasons)
    assert alias(settings, sqlite_store) == champion
    assert ended.candidate is not None, "kept, with its report, to be looked at"


def test_without_a_champion_there_is_nothing_to_refit(settings: Settings, sqlite_store: Store) -> None:
    label_world(settings, sqlite_store)
    ended = learner(settings, sqlite_store).learn("refit", by="alice")
    assert ended is not None
    assert (ended.state, ended.reasons[0][:11]) == ("failed", "no champion")
    with pytest.raises(ConfigurationError, match="no kind of run"):
        learner(settings, sqlite_store).learn("rethink", by="alice")


def test_a_candidate_may_be_made_the_challenger_instead(
    settings: Settings, sqlite_store: Store, champion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    label_world(settings, sqlite_store)
    careful = settings.model_copy(update={"gate": settings.gate.model_copy(update={"promote": False})})
    ended = learner(careful, sqlite_store).learn("refit", by="alice")
    assert ended is not None
    assert ended.state == "promoted"
    assert "it became the challenger" in ended.reasons[-1]
    say_run(ended)
    assert f"{ended.candidate} became the challenger; the champion stays" in capsys.readouterr().out
    assert alias(settings, sqlite_store) == champion
    assert registry_of(settings, sqlite_store).challenger() == ended.candidate


def test_a_champion_that_moves_meanwhile_is_the_one_compared_with(
    settings: Settings, sqlite_store: Store, champion: str, tmp_path: Path
) -> None:
    label_world(settings, sqlite_store)
    registry = registry_of(settings, sqlite_store)
    moved: list[str] = []

    def move(stage: str, _: Mapping[str, Any]) -> None:
        if stage == "promote" and not moved:
            under_way = sqlite_store.run(runs.running, write=False)
            assert under_way is not None
            # As good as the candidate, but another release.
            twin = tmp_path / "twin"
            shutil.copytree(Path(settings.resolved_artifacts) / str(under_way.candidate), twin)
            manifest = json.loads((twin / "manifest.json").read_text())
            (twin / "manifest.json").write_text(json.dumps({**manifest, "notes": "a twin"}))
            moved.append(registry.add(twin))
            registry.promote(moved[0], by="bob")

    ended = Learner(settings, sqlite_store, listen=move).learn("refit", by="alice")
    assert ended is not None
    assert (ended.state, ended.reasons[0][:14]) == ("rejected", "nothing gained")
    assert ended.report["gate"]["heads"]["champion"]["release"] == moved[0]
    assert registry.champion() == moved[0]


def test_a_run_that_is_stopped_goes_on_in_the_next_process(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    stop = threading.Event()

    def stop_at_gate(stage: str, _: Mapping[str, Any]) -> None:
        if stage == "gate":
            stop.set()

    with pytest.raises(RunStoppedError):
        Learner(settings, sqlite_store, stop=stop, listen=stop_at_gate).learn("refit", by="alice")
    waiting = sqlite_store.run(runs.running, write=False)
    assert waiting is not None
    assert (waiting.stage, waiting.attempts, waiting.owner) == ("gate", 0, None)
    stages: list[str] = []
    ended = Learner(settings, sqlite_store, listen=lambda stage, _: stages.append(stage)).learn("refit", by="bob")
    assert ended is not None
    assert (ended.id, ended.state, ended.by) == (waiting.id, "promoted", "alice")
    assert "refit" not in stages, "the candidate was there"
    assert alias(settings, sqlite_store) == ended.candidate == waiting.candidate


def test_a_run_that_another_process_took_over_writes_nothing_more(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)

    def lose(stage: str, _: Mapping[str, Any]) -> None:
        if stage == "promote":
            sqlite_store.run(lambda session: runs.take_over(session, owner="thief:1", lapse_s=-60))

    with pytest.raises(RunLostError):
        Learner(settings, sqlite_store, listen=lose).learn("refit", by="alice")
    held = sqlite_store.run(runs.running, write=False)
    assert held is not None
    assert (held.owner, held.token) == ("thief:1", 2)
    assert alias(settings, sqlite_store) == champion
    with pytest.raises(RunActiveError, match=f"another run is under way: refit {held.id}, in stage"):
        learner(settings, sqlite_store).learn("refit", by="bob")


def test_a_run_over_which_too_many_processes_died_is_given_up(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    impatient = settings.model_copy(update={"training": settings.training.model_copy(update={"max_attempts": 1})})
    sqlite_store.run(
        lambda session: runs.start(
            session, id="0" * 31 + "1", kind="refit", by="a", owner="dead:1", config={}, base_release=None
        )
    )
    sqlite_store.run(lambda session: runs.release_owner(session, "dead"))
    ended = learner(impatient, sqlite_store).resume()
    assert ended is not None
    assert (ended.state, ended.reasons) == ("failed", ["1 processes died over it, the last in stage started"])
    assert learner(impatient, sqlite_store).resume() is None


def test_a_slot_starts_one_run_and_names_it(settings: Settings, sqlite_store: Store, champion: str) -> None:
    label_world(settings, sqlite_store)
    ended = learner(settings, sqlite_store).learn("refit", by="schedule", slot=SLOT)
    assert ended is not None
    (slot,) = slots(sqlite_store)
    assert (slot.run_id, slot.outcome) == (ended.id, "started")
    assert learner(settings, sqlite_store).learn("refit", by="schedule", slot=SLOT) is None
    assert len(sqlite_store.run(runs.list_runs)) == 1


def test_a_retrain_trains_the_encoder_and_is_judged_like_any_other(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    said: list[Mapping[str, Any]] = []
    ended = Learner(settings, sqlite_store, listen=lambda stage, facts: said.append({"at": stage, **facts})).learn(
        "retrain", by="alice"
    )
    assert ended is not None
    assert ended.state in {"promoted", "rejected"}, ended.reasons
    registry = registry_of(settings, sqlite_store)
    loaded = registry.load(str(ended.candidate))
    assert loaded.encoder_sha256 != registry.load(champion).encoder_sha256
    assert alias(settings, sqlite_store) == (ended.candidate if ended.state == "promoted" else champion)
    assert ended.report["missed_generators"] == [NEW]
    taken = sqlite_store.run(lambda session: snapshots.load(session, str(ended.snapshot_id)), write=False)
    told = read_items(settings.data_path / "runs" / ended.id / "job" / TRAIN_FILE)
    groups = {one.sha256: one.group for one in taken.members}
    assert told
    assert all(one.group is not None and one.group == groups[one.sha256] for one in told)
    report = settings.data_path / "runs" / ended.id / "report"
    measured = json.loads((report / "metrics.json").read_text())
    assert measured["release"]["id"] == ended.candidate
    assert "</html>" in (report / "report.html").read_text()
    points = sqlite_store.run(lambda session: runs.metrics(session, ended.id))
    assert [(point.epoch, point.step) for point in points] == [(1, 3), (2, 6)]
    assert "linear/clean/mean" in points[0].metrics
    assert any("images_per_s" in facts for facts in said if facts["at"] == "train")
    assert [facts["at"] for facts in said if len(facts) == 1][:5] == [
        *("snapshot", "train", "refit", "report", "gate")
    ]


def test_a_training_that_fails_says_why(settings: Settings, sqlite_store: Store, champion: str) -> None:
    label_world(settings, sqlite_store)
    # Each step multiplies weights by 1 - 1000 · 1000: after seven no float32 holds them, on every processor.
    past_all_bounds = {"learning_rate": 1000.0, "weight_decay": 1000.0, "steps_per_epoch": 20}
    hopeless = settings.model_copy(update={"training": settings.training.model_copy(update=past_all_bounds)})
    ended = learner(hopeless, sqlite_store).learn("retrain", by="alice")
    assert ended is not None
    assert ended.state == "failed"
    assert "step" in ended.reasons[0]
    assert alias(settings, sqlite_store) == champion


def test_the_training_process_refuses_the_holdout(tmp_path: Path) -> None:
    items = []
    for number, data in enumerate([*pictures(REAL, 20), *pictures(NEW, 20)]):
        path = tmp_path / f"{number}.png"
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        items.append(Item(path=str(path), label=int(number >= 20), sha256=sha256, split="train"))
    items[7] = items[7].model_copy(update={"split": "holdout"})
    job = tmp_path / "job"
    write_job(job, TrainingJob(name="a test", encoder={"image_size": 32, "patch_size": 8}), items, items[:1])
    done = subprocess.run(
        [sys.executable, "-m", "code_worker.training.fitting.training_process", str(job)],
        env=os.environ,
        check=False,
        timeout=120,
    )
    assert done.returncode == 3
    assert "belongs to the hold-out" in (job / "failure.json").read_text()
    assert not (job / "result").exists()


def test_a_plan_says_what_would_happen_and_writes_nothing(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store, real=30, old=30, new=0)
    plan = learner(settings, sqlite_store).plan("retrain")
    assert plan.champion == champion
    assert plan.heads == ("knn", "linear", "svm")
    assert "30 new generated images, 50 are needed" in plan.missing
    assert plan.training is not None
    assert sqlite_store.run(runs.list_runs) == []
    assert sum(plan.snapshot[part]["real"] for part in ("train", "validation", "holdout")) == 30
