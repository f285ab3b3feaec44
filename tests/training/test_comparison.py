"""Candidate and champion on identical images, and whose embeddings may speak about whose labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from code_worker.errors import ArtifactError, TrainingError
from code_worker.releases.manifest import Thresholds
from code_worker.settings import GateSettings
from code_worker.training.gate.comparison import Side, gate_inputs, measured, missed_generators
from code_worker.training.gate.rule import GateDecision, decide
from code_worker.training.snapshot import Member, Snapshot
from code_worker_heads.linear import LinearHead
from tests.training.learning import is_held_out

CLEAN, FEED = "clean", "768px_q60"
Rows = dict[str, NDArray[np.float32]]
RNG = np.random.default_rng(0)
TOWARDS = RNG.normal(size=(4, 192)) / np.sqrt(192)


def make(counts: Mapping[str | None, int], *, new: tuple[str | None, ...] = (), first: int = 0) -> list[Member]:
    """So many members by generator; None is real."""
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    found = [
        Member(f"{first + number:064x}", int(kind is not None), kind, None, new=kind in new or None in new)
        for number, kind in enumerate(kinds)
    ]
    return [replace(one, split="holdout") if is_held_out(one.sha256) else one for one in found]


def seen(members: list[Member], distance: Mapping[str, float], *, seed: int = 0) -> Rows:
    """Embeddings through an encoder that moves each generator's images so far away from reals."""
    rng = np.random.default_rng(seed)
    rows = {}
    for member in members:
        away = distance.get(member.generator or "", 0.0)
        direction = TOWARDS[len(member.generator or "") % len(TOWARDS)]
        rows[member.sha256] = (rng.normal(size=192) + away * direction).astype(np.float32)
    return rows


def fitted(members: list[Member], rows: Rows) -> LinearHead:
    labels = np.array([member.label for member in members], np.int8)
    return LinearHead({}).fit(np.stack([rows[member.sha256] for member in members]), labels)


def side(name: str, encoder: str, head: LinearHead, rows: Rows) -> Side:
    return Side(name, encoder, {"linear": head}, "linear", Thresholds(), {CLEAN: rows, FEED: rows})


def snapshot(members: list[Member]) -> Snapshot:
    return Snapshot("latest", tuple(sorted(members, key=lambda member: member.sha256)))


def flipped(members: list[Member], share: float, name: str) -> list[Member]:
    """Reals of which a share is called a generator's."""
    rng = np.random.default_rng(5)
    return [
        replace(one, label=1, generator=name, new=True) if one.label == 0 and rng.random() < share else one
        for one in members
    ]


def gate(taken: Snapshot, candidate: Side, champion: Side | None) -> GateDecision:
    return decide(gate_inputs(taken, candidate, champion, min_holdout=8), GateSettings(max_regression=0.05))


WORLD = make({None: 300, "old": 150, "newer": 120}, new=("newer",))
"""An old generator, and one that is new."""


def test_a_new_generator_that_the_encoder_does_not_see_is_no_wrong_label() -> None:
    taken = snapshot(WORLD)
    rows = seen(WORLD, {"old": 14.0})
    champion = fitted([one for one in taken.train if one.generator != "newer"], rows)
    candidate = fitted(taken.train, rows)
    decision = gate(taken, side("c", "same", candidate, rows), side("h", "same", champion, rows))
    assert not decision.promote
    assert not [reason for reason in decision.reasons if "not to be trusted" in reason]
    assert decision.reasons[-1] == "the champion's encoder does not see newer: only a retrain can change that"
    assert decision.report["unseen"] == ["newer"]


def test_an_old_generator_is_always_checked() -> None:
    members = flipped(make({None: 300, "old": 150}), 0.3, "old")
    taken = snapshot(members)
    # The encoder sees neither: but the champion has learned of the old one, so that this cannot be.
    rows = seen(members, {})
    head = fitted(taken.train, rows)
    decision = gate(taken, side("c", "same", head, rows), side("h", "same", head, rows))
    assert any("labels of fake images are not to be trusted" in reason for reason in decision.reasons)


def test_a_retrain_that_sees_the_new_generator_is_promoted() -> None:
    taken = snapshot(WORLD)
    before, after = seen(WORLD, {"old": 14.0}), seen(WORLD, {"old": 14.0, "newer": 10.0}, seed=1)
    champion = fitted([one for one in taken.train if one.generator != "newer"], before)
    candidate = fitted(taken.train, after)
    decision = gate(taken, side("c", "new", candidate, after), side("h", "old", champion, before))
    assert decision.promote, decision.reasons
    assert next(change for change in decision.report["changes"] if change["group"] == "newer")["candidate"] > 0.8


@pytest.mark.parametrize("name", ["newer", "old"])
def test_wrong_labels_in_any_generators_name_are_noticed_through_the_candidates_eyes(name: str) -> None:
    taken = snapshot(flipped(WORLD, 0.3, name))
    before = seen(WORLD, {"old": 14.0})
    after = seen(WORLD, {"old": 14.0, "newer": 14.0}, seed=1)
    champion = fitted([one for one in taken.train if one.generator != "newer"], before)
    # What it was trained on it knows by heart: only the hold-out can tell.
    by_heart = {
        one.sha256: after[one.sha256] + 30.0 * one.label * TOWARDS[0].astype(np.float32) for one in taken.train
    }
    after = {**after, **by_heart}
    candidate = fitted(taken.train, after)
    decision = gate(taken, side("c", "new", candidate, after), side("h", "old", champion, before))
    assert not decision.promote
    assert any("labels of fake images are not to be trusted" in reason for reason in decision.reasons)


def test_images_that_one_of_them_could_not_read_are_left_out_for_both() -> None:
    taken = snapshot(WORLD)
    rows = seen(WORLD, {"old": 14.0, "newer": 14.0})
    head = fitted(taken.train, rows)
    gone = taken.holdout[:3]
    fewer = {sha256: row for sha256, row in rows.items() if sha256 not in {one.sha256 for one in gone}}
    broken = Side("c", "same", {"linear": head}, "linear", Thresholds(), {CLEAN: rows, FEED: fewer})
    inputs = gate_inputs(taken, broken, side("h", "same", head, rows), min_holdout=8)
    assert len(inputs.labels) == len(taken.holdout) - 3
    assert inputs.champion is not None
    assert len(inputs.champion.scores[FEED]["linear"]) == len(inputs.labels)


def test_a_head_that_breaks_its_contract_is_named() -> None:
    class Wild(LinearHead):
        def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
            return super().score(embeddings) + 7

    taken = snapshot(WORLD)
    rows = seen(WORLD, {"old": 14.0})
    head = Wild({}).restore(fitted(taken.train, rows).state())
    with pytest.raises(ArtifactError, match="head 'linear' returned scores outside"):
        gate_inputs(taken, side("c", "same", head, rows), None, min_holdout=8)
    absent = Side("c", "same", {"linear": head}, "gone", Thresholds(), {CLEAN: rows, FEED: rows})
    with pytest.raises(TrainingError, match="c has no head 'gone' to decide with"):
        gate_inputs(taken, absent, None, min_holdout=8)


def test_the_manifests_figures_are_overall_and_by_group() -> None:
    taken = snapshot(WORLD)
    rows = seen(WORLD, {"old": 14.0, "newer": 14.0})
    own = side("c", "same", fitted(taken.train, rows), rows)
    found = measured(taken.holdout, own.opinion(taken.holdout))
    assert set(found) == {CLEAN, FEED}
    assert found[CLEAN]["linear"]["overall"]["n"] == len(taken.holdout)
    assert set(found[CLEAN]["linear"]["groups"]) == {"real", "old", "newer"}


def test_generators_that_a_release_misses_are_those_it_should_learn() -> None:
    members = make({None: 60, "old": 30, "newcomer": 30, "rare": 9})
    rows = seen(members, {"old": 40.0})
    taught = [member for member in members if member.generator in {None, "old"}]
    release = side("r", "e", fitted(taught, rows), rows)
    assert missed_generators(members, release) == {"newcomer"}
    assert missed_generators(taught, release) == frozenset()
    assert missed_generators(members, replace(release, head="another")) == frozenset()


def test_an_image_that_was_never_encoded_says_nothing_of_its_generator() -> None:
    members = make({None: 60, "newcomer": 30})
    rows = seen(members, {})
    release = side("r", "e", fitted(members, rows), rows)
    known = {sha256: row for sha256, row in rows.items() if sha256 not in {one.sha256 for one in members[65:]}}
    assert missed_generators(members, replace(release, rows={CLEAN: known})) == frozenset()
