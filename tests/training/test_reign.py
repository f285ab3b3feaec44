"""What a champion's reign has spent, which policies the gate asks, and what heads and encoders learned here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from code_worker.errors import DatasetError
from code_worker.plugins import load_plugins
from code_worker.releases.manifest import Thresholds
from code_worker.settings import Settings
from code_worker.store import policies
from code_worker.store.engine import Session, Store
from code_worker.store.learning import image_groups
from code_worker.store.learning import snapshots as comparisons
from code_worker.store.learning.label_rules import Split
from code_worker.store.models import KeptImageRow
from code_worker.store.policies import PolicyRow
from code_worker.store.sql import table_of
from code_worker.training import snapshot as snapshots
from code_worker.training.fitting.launch import validation_parts
from code_worker.training.gate.comparison import Side, one_of_each_group
from code_worker.training.gate.gate_inputs import compared_on, policy_rules, trained_on, unlearned
from code_worker.training.learner import Learner
from code_worker.training.refit import HeadPlan, cross_fitted, more_images
from code_worker.training.snapshot import Member, Snapshot
from code_worker_heads.linear import LinearHead
from tests.training.learning import (
    NEW,
    OLD,
    REAL,
    build_champion,
    forget,
    held_out,
    hold_out,
    is_held_out,
    label,
    label_world,
    learn,
    learning_settings,
    pictures,
    promote_champion,
    registry_of,
)


def member(number: int, kind: str | None, split: Split = "train", group: str | None = None) -> Member:
    return Member(f"{number:064x}", int(kind is not None), kind, None, new=False, split=split, group=group)


def test_a_run_writes_down_what_it_compares_and_the_next_one_has_less(tmp_path, sqlite_store: Store) -> None:  # type: ignore[no-untyped-def]
    settings = learning_settings(tmp_path / "data")
    never = settings.model_copy(update={"gate": settings.gate.model_copy(update={"max_regression": 0.0001})})
    champion = promote_champion(settings, sqlite_store, build_champion(tmp_path / "release"))
    label_world(settings, sqlite_store)
    spent = []
    for _ in range(2):
        ended = Learner(never, sqlite_store).learn("refit", by="test", force=True)
        assert ended is not None
        assert ended.state == "rejected"
        spent.append(ended.report["gate"]["spending"])
    rows = sqlite_store.run(lambda session: comparisons.before(session, champion, run_id=""), write=False)
    assert [row.level for row in rows] == [one["level"] for one in spent]
    assert [one["before"] for one in spent] == [0, 1]
    assert spent[1]["level"] == pytest.approx(spent[0]["level"] / 2)
    assert rows[0].images == ended.report["gate"]["images"]["real"] + ended.report["gate"]["images"]["fake"]


def policy(tenant: str | None, head: str | None, low: float, high: float) -> PolicyRow:
    return PolicyRow("id", tenant, None, 1, head, low, high, datetime(2026, 11, 30, tzinfo=UTC), "test", "")


def test_the_gate_asks_each_rule_of_production_once() -> None:
    rows = [
        policy("acme", None, 0.4, 0.8),
        policy("other", "linear", 0.4, 0.8),
        policy(None, None, 0.5, 0.5),
        policy("third", "knn", 0.4, 0.8),
    ]
    found = policy_rules(rows, "linear", (0.5, 0.5))
    assert [(one.name, one.head, one.low, one.high) for one in found] == [
        ("tenant acme, every content type; tenant other, every content type", "linear", 0.4, 0.8),
        ("tenant third, every content type", "knn", 0.4, 0.8),
    ]


def test_the_encoder_learns_from_nothing_that_chooses_and_neither_is_held_out() -> None:
    kinds = (None, "sdxl")
    parts: tuple[tuple[Split, int], ...] = (("train", 60), ("validation", 20), ("holdout", 20))
    splits = [split for split, count in parts for _ in range(count)]
    enough = [member(n, kinds[n % 2], split) for n, split in enumerate(splits)]
    learned, validation = validation_parts(Snapshot("latest", tuple(enough)))
    assert {one.split for one in learned} == {"train"}
    assert {one.split for one in validation} == {"validation"}
    few = [member(n, kinds[n % 2], "holdout" if n >= 80 else "train", f"post {n // 4}") for n in range(100)]
    learned, validation = validation_parts(Snapshot("latest", tuple(few)))
    assert len(learned) + len(validation) == 80
    assert not any(one.holdout for one in [*learned, *validation])
    assert not {one.group for one in learned} & {one.group for one in validation}, "siblings stay together"
    assert [sum(one.label == label for one in validation) for label in (0, 1)] == [4, 4]


@pytest.mark.parametrize("groups_since", [False, True])
def test_heads_judge_further_images_that_they_were_fitted_without(groups_since: bool) -> None:
    """Labels of noise can be learned by heart and not told: who judges what it learned would be right always."""
    rng = np.random.default_rng(0)
    taught_then = [member(n, "g" if n % 2 else None) for n in range(200)]
    # A champion may have learned before there were groups, or when they had other names.
    members = [replace(one, group=f"group {one.sha256}") for one in taught_then] if groups_since else taught_then
    rows = {one.sha256: rng.normal(size=192).astype(np.float32) for one in members}
    labels = np.array([one.label for one in members], np.int8)
    head = LinearHead({"C": 1e6}).fit(np.stack([rows[one.sha256] for one in members]), labels)
    by_heart = head.score(np.stack([rows[one.sha256] for one in members])) >= 0.5
    assert ((by_heart == (labels == 1)).mean()) == 1
    taken = Snapshot("latest", tuple(members))
    side = Side("r", "e", {"linear": head}, "linear", Thresholds(), {"clean": rows})
    more = more_images(taken, frozenset({members[0].sha256}))
    assert len(more) == 199
    found = cross_fitted(
        more,
        taken,
        side,
        side,
        plans=({"linear": HeadPlan("linear", {"C": 1e6})},) * 2,
        plugins=load_plugins(Settings()),
        taught_champion=taught_then,
    )
    assert found is not None
    for scores in (found.candidate["clean"], found.champion["clean"]):
        right = ((scores >= 0.5) == (found.labels == 1)).mean()
        # Chance, five standard errors of 199 coins.
        assert abs(right - 0.5) < 5 * 0.5 / 199**0.5
    gone = Side("r", "e", {"linear": head}, "linear", Thresholds(), {"clean": dict(list(rows.items())[11:])})
    assert (
        cross_fitted(
            more,
            taken,
            side,
            gone,
            plans=({"linear": HeadPlan("linear", {})},) * 2,
            plugins=load_plugins(Settings()),
            taught_champion=taught_then,
        )
        is None
    ), "heads fitted on what is left are not the champion's"


def test_where_a_fold_takes_a_whole_class_nothing_is_cross_fitted() -> None:
    rng = np.random.default_rng(0)
    members = [member(n, "g" if n % 2 else None, group="one post" if n % 2 else None) for n in range(100)]
    rows = {one.sha256: rng.normal(size=192).astype(np.float32) for one in members}
    labels = np.array([one.label for one in members], np.int8)
    head = LinearHead({}).fit(np.stack([rows[one.sha256] for one in members]), labels)
    side = Side("r", "e", {"linear": head}, "linear", Thresholds(), {"clean": rows})
    plans = {"linear": HeadPlan("linear", {})}
    found = cross_fitted(
        members,
        Snapshot("latest", tuple(members)),
        side,
        side,
        plans=(plans, plans),
        plugins=load_plugins(Settings()),
        taught_champion=members,
    )
    assert found is None


def test_a_copy_of_what_the_encoder_learned_is_no_further_image() -> None:
    members = [member(0, None, group="a"), member(1, None, group="a"), member(2, None, group="b"), member(3, None)]
    more = more_images(Snapshot("latest", tuple(members)), frozenset({members[0].sha256}))
    assert more == members[2:]


def test_of_a_group_one_image_of_each_class_and_generator_is_asked_about() -> None:
    """Copies are no further evidence, and who adds some chooses nothing."""
    kinds = [None, None, "sdxl", "sdxl", "flux"]
    record = [member(n, kind, "holdout", group="b") for n, kind in enumerate(kinds)]
    others = [member(10, None, "holdout", group="a"), member(11, None, "holdout")]
    found = one_of_each_group([*record, *others])
    assert sorted((one.group or one.sha256, one.generator or "") for one in found) == sorted(
        [("a", ""), ("b", ""), ("b", "flux"), ("b", "sdxl"), (others[1].sha256, "")]
    )
    flood = [member(100 + n, "sdxl", "train", group="post") for n in range(50)]
    rest = [member(200 + n, None if n % 2 else "sdxl", "train", group=f"{n}") for n in range(60)]
    more = more_images(Snapshot("latest", (*flood, *rest)), frozenset())
    assert sum(one.group == "post" for one in more) == 1
    assert len(more) == 61


def test_a_group_that_is_too_large_to_choose_by_stays_to_be_learned_from() -> None:
    reals = [member(n, None) for n in range(80)]
    large = [member(100 + n, "sdxl", group="post") for n in range(60)]
    small = [member(200 + n, "sdxl") for n in range(20)]
    learned, validation = validation_parts(Snapshot("latest", (*reals, *large, *small)))
    assert {one.group for one in large} <= {one.group for one in learned}
    assert [sum(one.label == label for one in validation) for label in (0, 1)] == [10, 10]
    with pytest.raises(DatasetError, match="too few groups"):
        validation_parts(Snapshot("latest", (*reals, *large)))


def test_what_a_refitted_champion_learned_is_its_runs_snapshot(tmp_path, sqlite_store: Store) -> None:  # type: ignore[no-untyped-def]
    settings = learning_settings(tmp_path / "data")
    first = promote_champion(settings, sqlite_store, build_champion(tmp_path / "release"))
    assert sqlite_store.run(lambda session: trained_on(session, first), write=False).heads is None
    label_world(settings, sqlite_store)
    ended = Learner(settings, sqlite_store).learn("refit", by="test", force=True)
    assert ended is not None
    known = sqlite_store.run(lambda session: trained_on(session, str(ended.candidate)), write=False)
    assert known.heads is not None
    counts = ended.report["snapshot"]
    assert len(known.heads) == sum(
        counts[part][kind] for part in ("train", "validation") for kind in ("real", "fake")
    )
    assert known.encoder == frozenset(), "a refit teaches the encoder nothing"


def test_what_a_release_learned_is_not_judged_on_after_retention_put_it_on_the_other_side(
    tmp_path: Path, store: Store
) -> None:
    settings = learning_settings(tmp_path)
    store.run(lambda session: image_groups.begin_with(session, bytes(32)))

    def take() -> Snapshot:
        return store.run(lambda session: snapshots.take(session, settings.labels), write=False)

    known = label(settings, store, held_out(REAL, 4, wanted=False), "real")
    begun = take()
    assert {one.sha256 for one in begun.training_share} == set(known)
    learn(store, begun, "r-1", base=None)
    learn(store, begun, "r-2", base="r-1")
    forget(store, known[:2])
    again = label(settings, store, held_out(REAL, 2, wanted=False), "real", by="bob")
    others = label(settings, store, pictures(OLD, 3), "fake")
    hold_out(store, [*again, *others])
    sibling(store, others[0], again[0])
    taken = take()
    assert {one.sha256 for one in taken.holdout} == {*again, *others}, "retention forgot on which side they were"
    left = store.run(lambda session: unlearned(session, taken, ["r-2"]), write=False)
    assert {one.sha256 for one in left.holdout} == set(others[1:]), "neither do copies of them count"
    assert left.left_out == {"learned": {"alice": 1, "bob": 2}}
    assert left.training_share == taken.training_share
    asked = store.run(
        lambda session: compared_on(session, taken, candidate="r-elsewhere", champion="r-1"), write=False
    )
    assert asked.holdout == [one for one in left.holdout if one.new]
    assert store.run(lambda session: unlearned(session, taken, ["r-elsewhere"]), write=False) == taken


def sibling(store: Store, sha256: str, of: str) -> None:
    """Puts an image into the group of another one."""
    kept = table_of(KeptImageRow)
    group = select(kept.c.group_id).where(kept.c.sha256 == of).scalar_subquery()
    store.run(lambda session: session.execute(kept.update().where(kept.c.sha256 == sha256).values(group_id=group)))


def test_after_a_rollback_the_gate_asks_what_is_new_to_the_champion_that_is_back(
    tmp_path: Path, sqlite_store: Store
) -> None:
    settings = learning_settings(tmp_path / "data")
    champion = promote_champion(settings, sqlite_store, build_champion(tmp_path / "release"))
    label_world(settings, sqlite_store)
    first = Learner(settings, sqlite_store).learn("refit", by="alice")
    assert first is not None
    assert first.state == "promoted", first.reasons
    label(settings, sqlite_store, pictures(REAL, 1, first=7000), "real")

    registry = registry_of(settings, sqlite_store)

    def roll_back(stage: str, _: Mapping[str, Any]) -> None:
        if stage == "gate" and registry.champion() != champion:
            registry.rollback(by="bob")

    second = Learner(settings, sqlite_store, listen=roll_back).learn("refit", by="alice", force=True)
    assert second is not None
    assert second.report["snapshot"]["train"]["new_fake"] == 0, "nothing of it was new to the champion of then"
    gate = second.report["gate"]
    assert gate["heads"]["champion"]["release"] == champion
    assert gate["new"] == sum(gate["images"].values()), "nobody knows what an imported release learned"
    assert second.state == "promoted", second.reasons
    assert f"better on {NEW}" in " ".join(second.reasons)


def test_the_gate_does_not_count_held_out_images_that_the_champion_learned_before_retention(
    tmp_path: Path, sqlite_store: Store
) -> None:
    settings = learning_settings(tmp_path / "data")
    promote_champion(settings, sqlite_store, build_champion(tmp_path / "release"))
    label_world(settings, sqlite_store)
    first = Learner(settings, sqlite_store).learn("refit", by="alice")
    assert first is not None
    assert first.state == "promoted", first.reasons
    seen = [data for data in pictures(REAL, 60) if not is_held_out(hashlib.sha256(data).hexdigest())][:3]
    forget(sqlite_store, [hashlib.sha256(data).hexdigest() for data in seen])
    hold_out(sqlite_store, label(settings, sqlite_store, seen, "real", by="bob"))
    second = Learner(settings, sqlite_store).learn("refit", by="alice", force=True)
    assert second is not None
    assert second.report["gate"]["learned"] == {"bob": 3}
    held = second.report["snapshot"]["holdout"]
    assert second.report["gate"]["images"] == {"real": held["real"] - 3, "fake": held["fake"]}
    evaluation: Any = registry_of(settings, sqlite_store).load(str(second.candidate)).manifest.evaluation
    assert evaluation["holdout"]["clean"]["linear"]["overall"]["n"] == held["real"] - 3 + held["fake"]


def test_a_promotion_names_policies_that_another_releases_scores_drew(tmp_path, sqlite_store: Store) -> None:  # type: ignore[no-untyped-def]
    settings = learning_settings(tmp_path / "data")
    champion = promote_champion(settings, sqlite_store, build_champion(tmp_path / "release"))
    label_world(settings, sqlite_store)

    def put(session: Session) -> None:
        policies.put(session, low=0.4, high=0.6, tenant="acme", by="test", release_id=champion)
        policies.put(session, low=0.4, high=0.6, tenant="by hand", by="test")

    sqlite_store.run(put)
    ended = Learner(settings, sqlite_store).learn("refit", by="test", force=True)
    assert ended is not None
    assert ended.state == "promoted", ended.reasons
    assert ended.report["stale_policies"] == ["tenant acme, every content type"]
    assert any(
        "thresholds of tenant acme, every content type were drawn by another release's scores" in one
        for one in ended.reasons
    )
    conditions = {change["condition"] for change in ended.report["gate"]["changes"]}
    assert "clean at the policy of tenant acme, every content type; tenant by hand, every content type" in conditions
