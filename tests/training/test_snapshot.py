"""What a run learns from and is measured on: frozen, split by content, and never mixed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from code_worker.data.datasets.examples import FAKE, UNNAMED
from code_worker.errors import DatasetError, TrainingError
from code_worker.plugins import load_plugins
from code_worker.settings import LabelSettings, ScheduleSettings, Settings
from code_worker.store import releases
from code_worker.store.engine import Session, Store
from code_worker.store.erasure import rows as erasing
from code_worker.store.ids import uuid7
from code_worker.store.learning import labels, runs
from code_worker.store.learning import snapshots as table
from code_worker.store.learning.label_rules import SPLITS
from code_worker.store.learning.labels import NewLabel
from code_worker.store.models import ImageGroupRow, KeptImageRow
from code_worker.store.sql import table_of
from code_worker.training import snapshot as snapshots
from code_worker.training.fitting.job import Item
from code_worker.training.refit import fit_heads, plan_heads
from code_worker.training.snapshot import Learned, Snapshot, learned_by
from tests.training.learning import NEW, OLD, REAL, held_out, label, label_world, learning_settings, pictures


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return learning_settings(tmp_path)


def take(store: Store, settings: Settings, **rule: object) -> Snapshot:
    chosen = LabelSettings(**rule) if rule else settings.labels  # type: ignore[arg-type]
    return store.run(lambda session: snapshots.take(session, chosen), write=False)


def test_a_snapshot_counts_by_split_label_and_generator(store: Store, settings: Settings) -> None:
    label_world(settings, store, real=30, old=20, new=10)
    label(settings, store, pictures("unnamed", 3), "fake")
    counts = take(store, settings).counts()
    parts = [counts[split] for split in SPLITS]
    assert sum(part["real"] for part in parts) == 30
    assert sum(part["fake"] for part in parts) == 33
    assert {name for part in parts for name in part["generators"]} == {OLD, NEW, UNNAMED}
    assert sum(part["new_real"] + part["new_fake"] for part in parts) == 63


def test_a_generator_that_was_called_like_a_group_of_the_report_gets_a_name_of_its_own(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_world(settings, store, real=5, old=5, new=5)
    with monkeypatch.context() as before:
        # As an older version let it be labelled.
        before.setattr(labels, "RESERVED", frozenset())
        label(settings, store, pictures("reserved", 3), "fake", generator="real")
    taken = take(store, settings)
    assert sum(member.generator == "generator real" for member in taken.members) == 3
    assert not any(member.generator == "real" for member in taken.members)


def test_a_frozen_snapshot_comes_back_as_it_was(store: Store, settings: Settings) -> None:
    label_world(settings, store, real=8, old=4, new=4)
    taken = take(store, settings)
    for _ in range(2):
        store.run(lambda session: snapshots.freeze(session, taken))
    label_world(settings, store, real=12, old=4, new=4)
    again = store.run(lambda session: snapshots.load(session, taken.id))
    assert again == taken
    assert take(store, settings).digest != taken.digest
    assert take(store, settings).digest == take(store, settings).digest


def test_contradicting_labels_are_decided_by_the_rule_or_left_out_and_counted(
    store: Store, settings: Settings
) -> None:
    image = pictures(REAL, 1)
    label(settings, store, pictures(REAL, 6), "real")
    label(settings, store, image, "fake", by="bob")
    latest = take(store, settings)
    assert (len(latest.members), latest.contradicted, latest.undecided) == (6, 1, 0)
    assert sum(member.label == FAKE for member in latest.members) == 1
    unanimous = take(store, settings, rule="unanimous")
    assert (len(unanimous.members), unanimous.contradicted, unanimous.undecided) == (5, 0, 1)
    assert unanimous.counts()["undecided"] == 1


def test_a_label_for_an_image_that_nobody_kept_is_left_out_and_counted(store: Store, settings: Settings) -> None:
    label(settings, store, pictures(REAL, 2), "real")
    store.run(lambda session: labels.add(session, [NewLabel("a" * 64, "fake", "alice", "api")]))
    taken = take(store, settings)
    assert (len(taken.members), taken.unkept) == (2, 1)


def register(store: Store, *names: str) -> None:
    def add(session: Session) -> None:
        for name in names:
            digest = hashlib.sha256(name.encode()).hexdigest()
            releases.add(session, id=name, manifest_sha256=digest, location="", manifest={}, source="", by="ann")

    store.run(add)


def point(store: Store, alias: str, release: str) -> None:
    store.run(lambda session: releases.move_alias(session, alias, release, by="ann", reason=""))


def new(store: Store, settings: Settings) -> set[str]:
    return {member.sha256 for member in take(store, settings).members if member.new}


def test_new_is_what_the_champion_was_not_taught(store: Store, settings: Settings) -> None:
    register(store, "r-1")
    label(settings, store, pictures(REAL, 10), "real")
    taught(store, take(store, settings), "r-1", None)
    assert len(new(store, settings)) == 10, "a release that judges nothing was taught, and no champion"
    point(store, "challenger", "r-1")
    assert len(new(store, settings)) == 10, "nor does a challenger decide"
    point(store, "champion", "r-1")
    (changed,) = label(settings, store, pictures(REAL, 1), "fake")
    (added,) = label(settings, store, pictures(REAL, 1, first=10), "real")
    assert new(store, settings) == {changed, added}


def test_what_only_a_release_learned_that_was_rolled_back_is_new_again(store: Store, settings: Settings) -> None:
    register(store, "r-1", "r-2", "r-imported")
    label(settings, store, pictures(REAL, 6), "real")
    taught(store, take(store, settings), "r-1", None)
    point(store, "champion", "r-1")
    (changed,) = label(settings, store, pictures(REAL, 1), "fake")
    newcomers = label(settings, store, pictures(NEW, 4), "fake", generator=NEW)
    taught(store, take(store, settings), "r-2", "r-1")
    point(store, "champion", "r-2")
    assert new(store, settings) == set()
    store.run(lambda session: releases.rollback(session, "champion", by="ann", reason="too strict"))
    assert new(store, settings) == {changed, *newcomers}
    taken = take(store, settings)
    later = store.run(lambda session: snapshots.as_new_to(session, taken, "r-2"), write=False)
    assert not any(member.new for member in later.members), "and not to the one that was taken back"
    assert later.digest == taken.digest
    point(store, "champion", "r-imported")
    assert len(new(store, settings)) == 10, "of what an imported release learned nothing is known"


def test_what_a_champion_goes_back_to_was_taught_counts_and_its_own_labels_count_first(
    store: Store, settings: Settings
) -> None:
    register(store, "r-1", "r-2")
    label(settings, store, pictures(REAL, 4), "real")
    whole = take(store, settings)
    first, second = whole.members[:2]
    taught(store, whole, "r-1", None)
    kept = (replace(first, label=FAKE), *whole.members[2:])
    taught(store, replace(whole, id=uuid7(), members=kept), "r-2", "r-1")
    point(store, "champion", "r-2")
    assert new(store, settings) == {first.sha256}, f"{second.sha256} was taught to r-1, from which r-2 was made"


def test_what_has_forgotten_an_image_teaches_the_same_as_if_it_had_never_known_it(
    store: Store, settings: Settings
) -> None:
    (gone, *_) = label(settings, store, pictures(REAL, 5), "real")
    taken = take(store, settings)
    store.run(lambda session: snapshots.freeze(session, taken))
    store.run(lambda session: erasing.forget_in_snapshot(session, taken.id, {gone}, actor="a", subject="e"))
    info = store.run(lambda session: table.get(session, taken.id), write=False)
    assert info is not None
    assert info.digest == replace(taken, members=tuple(one for one in taken.members if one.sha256 != gone)).digest


def test_what_is_missing_to_the_minimum_numbers_is_said(store: Store, settings: Settings) -> None:
    label(settings, store, held_out(REAL, 2, wanted=True), "real")
    label(settings, store, held_out(REAL, 3, wanted=False), "real")
    label(settings, store, held_out(OLD, 4, wanted=False), "fake")
    asked = ScheduleSettings(min_new_real=6, min_new_fake=4, min_holdout=2)
    assert snapshots.shortages(take(store, settings), asked) == [
        "5 new real images, 6 are needed",
        "0 generated images in the hold-out, 2 are needed",
    ]
    assert len(snapshots.shortages(take(store, settings), ScheduleSettings())) == 4


def test_no_labels_and_one_class_only_cannot_be_learned_from(store: Store, settings: Settings) -> None:
    with pytest.raises(DatasetError, match="no labelled image to learn from: label some with `code-worker label`"):
        snapshots.check_classes(take(store, settings))
    label(settings, store, held_out(REAL, 3, wanted=False), "real")
    with pytest.raises(DatasetError, match="no fake image to learn from among 3 labelled ones"):
        snapshots.check_classes(take(store, settings))
    label(settings, store, held_out(OLD, 3, wanted=True), "fake")
    with pytest.raises(DatasetError, match="no fake image to learn from among 6 labelled ones"):
        snapshots.check_classes(take(store, settings))
    label(settings, store, held_out(OLD, 1, wanted=False), "fake")
    snapshots.check_classes(take(store, settings))


def test_heads_are_never_fitted_on_the_holdout(store: Store, settings: Settings) -> None:
    label_world(settings, store, real=12, old=6, new=6)
    taken = take(store, settings)
    plugins = load_plugins(settings)
    embeddings = np.zeros((len(taken.members), 192), np.float32)
    with pytest.raises(TrainingError, match="belongs to the hold-out and must never be learned from"):
        fit_heads(plan_heads(plugins, None), plugins, taken.members, embeddings)


def test_an_item_of_a_training_job_is_recognised_as_held_out() -> None:
    from code_worker.data.labelled_images import refuse_holdout  # the trainer's own check

    refuse_holdout([Item(path="a.png", label=0, sha256="e" * 64, split="train")])
    with pytest.raises(TrainingError, match="f" * 64):
        refuse_holdout([Item(path="a.png", label=0, sha256="f" * 64, split="holdout")])


def put(store: Store, hashes: list[str], split: str) -> None:
    """Moves images into a group of their own in this part, as no way through the code could."""
    groups, kept = table_of(ImageGroupRow), table_of(KeptImageRow)

    def write(session: Session) -> None:
        session.execute(groups.insert().values(id=split * 2, split=split))
        session.execute(kept.update().where(kept.c.sha256.in_(hashes)).values(group_id=split * 2))

    store.run(write)


def test_the_part_of_an_image_is_that_of_its_group_and_recorded(store: Store, settings: Settings) -> None:
    hashes = label(settings, store, pictures(REAL, 12), "real")
    for number, split in enumerate(("train", "validation", "holdout")):
        put(store, hashes[number * 3 : number * 3 + 3], split)
    taken = take(store, settings)
    parts = {split: {one.sha256 for one in taken.members if one.split == split} for split in SPLITS}
    assert parts["train"] >= set(hashes[:3])
    assert parts["validation"] >= set(hashes[3:6])
    assert parts["holdout"] >= set(hashes[6:9])
    assert {one.sha256 for one in taken.training_share} == parts["train"] | parts["validation"]
    assert {one.group for one in taken.validation if one.sha256 in hashes[3:6]} == {"validationvalidation"}
    store.run(lambda session: snapshots.freeze(session, taken))
    put(store, hashes[:9], "none")
    assert store.run(lambda session: snapshots.load(session, taken.id)) == taken, "what was recorded stays"
    assert take(store, settings).digest != taken.digest


def test_what_is_between_two_parts_is_no_member_and_counted_by_who_labelled_it(
    store: Store, settings: Settings
) -> None:
    hashes = label(settings, store, pictures(REAL, 6), "real")
    put(store, hashes[:2], "none")
    taken = take(store, settings)
    assert {one.sha256 for one in taken.members} == set(hashes[2:])
    assert (taken.counts()["left_out"], taken.unkept) == ({"split": {"alice": 2}}, 0)


def taught(store: Store, taken: Snapshot, release: str, base: str | None) -> None:
    """A run that made this release from that one, by this snapshot."""
    run_id = uuid7()

    def learn(session: Session) -> None:
        run = runs.start(session, id=run_id, kind="refit", by="a", owner="a:1", config={}, base_release=base)
        assert run is not None
        snapshots.freeze(session, taken)
        runs.note(session, run.lease, snapshot_id=taken.id, candidate=release)
        runs.finish(session, run.lease, "rejected")

    store.run(learn)


def test_what_a_release_learned_from_is_known_back_to_where_nothing_is_recorded(
    store: Store, settings: Settings
) -> None:
    first = label(settings, store, pictures(REAL, 12), "real")
    put(store, first[:3], "holdout")
    put(store, first[3:], "validation")
    taught(store, take(store, settings), "r-1", "r-imported")
    second = label(settings, store, pictures(OLD, 3), "fake")
    put(store, second, "train")
    put(store, first[3:6], "none")
    taught(store, take(store, settings), "r-2", "r-1")

    def learned(*releases: str) -> Learned:
        return store.run(lambda session: learned_by(session, releases), write=False)

    assert learned("r-1") == Learned(frozenset(first[3:]), ("r-imported",))
    assert learned("r-2") == Learned(frozenset(first[3:] + second), ("r-imported",))
    assert learned("r-imported", "r-elsewhere") == Learned(frozenset(), ("r-elsewhere", "r-imported"))
