"""What one hand may teach: a share, no floods, no stream of errors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from code_worker.training.gate.label_quality import drop_floods, suspicions
from code_worker.training.gate.safeguards import measure_drift, stability_index
from code_worker.training.snapshot import Member, cap_shares


def members(new: bool = True, first: int = 0, **counts: int) -> list[Member]:
    """So many images by each labeller, sorted by content hash."""
    names = [name for name, count in counts.items() for _ in range(count)]
    return [Member(f"{first + n:064x}", n % 2, None, None, new=new, by=by) for n, by in enumerate(names)]


def left(max_share: float | None, *trusted: str, **counts: int) -> dict[str, int]:
    stay, out = cap_shares(members(**counts), max_share, trusted)
    assert Counter(one.by for one in stay) + Counter(out) == Counter(counts)
    return dict(out)


def test_a_labeller_gets_the_share_of_what_stays_and_no_more() -> None:
    honest = dict.fromkeys(["a", "b", "c", "d"], 50)
    out = left(0.2, vandal=1000, **honest)
    assert out == {"vandal": 950}, "50 of 250 are a fifth"


def test_one_labeller_alone_is_not_capped_and_few_get_equal_shares() -> None:
    assert left(0.2, alone=500) == {}
    assert left(0.2, one=500, two=100) == {"one": 400}
    assert left(None, one=500, two=1) == {}


def test_trusted_labellers_count_and_are_never_cut() -> None:
    assert left(0.2, "owner", owner=400, stranger=300) == {"stranger": 200}
    assert left(0.2, "owner", owner=400, stranger=80) == {}


def test_what_was_learned_before_is_nobodys_share() -> None:
    old = members(new=False, vandal=500)
    stay, out = cap_shares([*old, *members(first=1000, vandal=30, a=10)], 0.5)
    assert (len(stay), out) == (500 + 20, {"vandal": 20})


@pytest.mark.parametrize("seed", range(20))
def test_whoever_labels_how_much_nobody_keeps_more_than_the_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    share = float(rng.uniform(0.05, 0.9))
    counts = {f"l{n}": int(rng.integers(1, 300)) for n in range(rng.integers(2, 12))}
    stay, out = cap_shares(members(**counts), share)
    kept = Counter(one.by for one in stay)
    allowed = max(share, 1 / len(counts)) * len(stay)
    assert max(kept.values()) <= allowed + 1e-6
    assert kept.total() + sum(out.values()) == sum(counts.values())
    if out:
        # One more of each who was cut would be too many: nothing is thrown away for nothing.
        limit = max(kept.values()) + 1
        more = Counter({by: min(count, limit) for by, count in counts.items()})
        assert max(more.values()) > max(share, 1 / len(counts)) * more.total() + 1e-9


def spread(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 192)).astype(np.float32)


def test_of_a_flood_of_nearly_equal_images_a_few_stay_and_other_images_all() -> None:
    honest, flood = members(new=False, owner=100), members(first=1000, vandal=200)
    same = [Member(one.sha256, 0, None, None, new=True, by=one.by) for one in flood]
    near = spread(1, seed=1) + 0.02 * spread(200, seed=2)
    stay, out = drop_floods([*honest, *same], np.concatenate([spread(100), near]), 5)
    assert out == {"vandal": 195}
    assert [one.by for one in stay].count("owner") == 100
    assert len(stay) == 105


def test_different_images_of_one_labeller_are_no_flood_and_equal_ones_of_many_neither() -> None:
    many = members(first=0, a=60)
    assert drop_floods(many, spread(60), 5)[1] == {}
    by_many = members(first=0, a=4, b=4, c=4)
    assert drop_floods(by_many, spread(1) + 1e-3 * spread(12, seed=3), 5)[1] == {}
    assert drop_floods(many, np.zeros((60, 192), np.float32), None)[1] == {}


def test_a_labeller_who_contradicts_the_neighbours_stands_out_and_the_honest_do_not() -> None:
    truth = np.arange(400) % 2
    embeddings = spread(400) + 3 * truth[:, None].astype(np.float32)
    said = truth.copy()
    by = np.where(np.arange(400) < 300, "owner", np.where(np.arange(400) < 350, "alice", "vandal"))
    said[350:] = np.where(np.arange(50) % 3 > 0, 1 - truth[350:], truth[350:])
    made = [Member(f"{n:064x}", int(said[n]), None, None, new=n >= 300, by=str(by[n])) for n in range(400)]
    found = suspicions(made, embeddings, said.astype(np.int8), np.ones(400, bool))
    assert [one.by for one in found] == ["vandal", "alice"]
    vandal, alice = found
    assert vandal.ratio > 4
    assert alice.ratio < 1.5
    assert (vandal.images, alice.images) == (50, 50)


def test_fewer_than_ten_labels_suspect_nobody() -> None:
    made = [*members(new=False, owner=50), *members(first=900, x=9)]
    assert suspicions(made, spread(59), np.array([one.label for one in made], np.int8), np.ones(59, bool)) == ()


def test_the_same_scores_have_not_drifted_and_others_have() -> None:
    scores = np.random.default_rng(0).beta(0.3, 0.3, 1000).astype(np.float32)
    assert stability_index(scores, scores) == pytest.approx(0)
    assert stability_index(scores, np.clip(scores + 0.002, 0, 1).astype(np.float32)) < 0.05
    turned = np.where(np.arange(1000) % 4 == 0, 1 - scores**3, scores).astype(np.float32)
    assert stability_index(np.full(1000, 0.05, np.float32), np.full(1000, 0.95, np.float32)) > 5
    labels = (scores >= 0.5).astype(np.int8)
    found = measure_drift(labels, scores, turned, champion_at=(0.5, 0.5), candidate_at=(0.5, 0.5))
    assert found is not None
    assert (found.images, found.canaries) == (1000, 1000)
    assert found.agreement == pytest.approx(float(((scores >= 0.5) == (turned >= 0.5)).mean()))
    assert found.agreement < found.agreement_high
    assert measure_drift(labels[:0], scores[:0], scores[:0], champion_at=0.5, candidate_at=0.5) is None


def test_only_what_the_champion_judges_rightly_and_without_doubt_is_a_canary() -> None:
    found = measure_drift(
        np.array([0, 0, 1, 1, 1], np.int8),
        np.array([0.1, 0.9, 0.5, 0.9, 0.9], np.float32),
        np.array([0.1, 0.1, 0.9, 0.5, 0.9], np.float32),
        champion_at=(0.3, 0.7),
        candidate_at=(0.3, 0.7),
    )
    assert found is not None
    assert (found.images, found.canaries, found.agreement) == (5, 3, pytest.approx(2 / 3))
