"""What a challenger sees of a batch, and what it says afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from code_worker.moderation.judge import Judge, Judged
from code_worker.moderation.policy import Policy, PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.runtime import Runtime
from code_worker.moderation.shadow import Budget, ShadowBatch, in_share, shadow_scores
from code_worker.moderation.vectors import pack
from code_worker.settings import LimitSettings
from code_worker.types import Job, Label, ShadowScore
from tests.moderation.doubles import BrokenHead, DictSources, FirstValueHead, PickyHead, png, runtime

MIB = 2**20


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def other_encoder(**heads: Any) -> Runtime:
    return replace(runtime(release="r-new", **heads), encoder_sha256="f" * 64)


@pytest.fixture
def pool() -> Iterator[PriorityPool]:
    with PriorityPool(4) as pool:
        yield pool


@pytest.fixture
def judge_seen(pool: PriorityPool) -> Callable[..., Judged]:
    """Judges objects by URI while a batch looks on, and hands the verdicts to it."""

    def judge(
        objects: Mapping[str, bytes | Exception],
        batch: ShadowBatch,
        *,
        champion: Runtime | None = None,
        policies: PolicyBook | None = None,
        known: Mapping[str, bytes] | None = None,
        **job: Any,
    ) -> Judged:
        def lookup(encoder: str, hashes: Sequence[str]) -> Mapping[str, bytes]:
            return {name: vector for name, vector in (known or {}).items() if name in hashes}

        jobs = [Job(uri, uri, **job) for uri in objects]
        made = Judge(sources=DictSources(objects), pool=pool, limits=LimitSettings(), known=lookup)
        judged = made.judge(jobs, champion or runtime(), policies or PolicyBook(), observer=batch)
        batch.verdicts = judged.verdicts
        return judged

    return judge


def scores_of(batch: ShadowBatch, challenger: Runtime, value: float = 0.8) -> list[ShadowScore]:
    """As if the challenger's encoder gave every image this embedding."""
    embeddings = {sha256: np.full(192, value, np.float32) for sha256 in batch.images}
    return shadow_scores(batch, embeddings, challenger, lambda *_: None)


def test_the_share_is_by_content_and_grows_by_adding() -> None:
    hashes = [sha(str(number).encode()) for number in range(4000)]
    tenth, half = ({name for name in hashes if in_share(name, share)} for share in (0.1, 0.5))
    assert tenth < half
    assert 300 < len(tenth) < 500
    assert all(in_share(name, 1.0) for name in hashes)
    assert not any(in_share(name, 0.0) for name in hashes)


def test_with_the_champions_encoder_every_embedding_is_seen_and_no_pixel(
    judge_seen: Callable[..., Judged],
) -> None:
    batch = ShadowBatch(runtime(release="r-new"), runtime(), 1.0, Budget(MIB))
    known = {sha(png(9)): pack(np.full(192, 0.9, np.float32))}
    judge_seen({"new": png(51), "twin": png(51), "old": png(9), "bad": b"no image"}, batch, known=known)
    assert {name: float(vector[0]) for name, vector in batch.images.items()} == {
        sha(png(51)): pytest.approx(0.2),
        sha(png(9)): pytest.approx(0.9),
    }
    assert {verdict.uri for _, verdict in batch.judged()} == {"new", "twin", "old"}


def test_with_another_encoder_crops_are_seen_and_the_bytes_of_what_was_not_decoded(
    judge_seen: Callable[..., Judged],
) -> None:
    batch = ShadowBatch(other_encoder(), runtime(), 1.0, Budget(MIB))
    known = {sha(png(9)): pack(np.full(192, 0.9, np.float32))}
    judge_seen({"new": png(51), "old": png(9)}, batch, known=known)
    assert batch.images[sha(png(9))] == png(9)
    crop = batch.images[sha(png(51))]
    assert isinstance(crop, np.ndarray)
    assert crop.shape == (224, 224, 3)
    assert (crop == 51).all()


def test_only_the_share_is_kept(judge_seen: Callable[..., Judged]) -> None:
    objects = {str(value): png(value) for value in range(40)}
    batch = ShadowBatch(runtime(release="r-new"), runtime(), 0.5, Budget(MIB))
    judge_seen(objects, batch)
    assert set(batch.images) == {sha(data) for data in objects.values() if in_share(sha(data), 0.5)}
    assert 0 < len(batch.images) < 40


def test_what_the_budget_does_not_hold_is_counted_and_freed_room_is_used_again(
    judge_seen: Callable[..., Judged],
) -> None:
    budget = Budget(2 * (224 * 224 * 3 + 4096))
    batch = ShadowBatch(other_encoder(), runtime(), 1.0, budget)
    judged = judge_seen({str(value): png(value) for value in range(5)}, batch)
    assert len(judged.verdicts) == 5, "the champion judges all the same"
    assert (len(batch.images), batch.dropped) == (2, 3)
    batch.free()
    assert (batch.images, batch.judged()) == ({}, [])
    assert budget.take(2 * (224 * 224 * 3 + 4096))
    assert not budget.take(1)


def test_verdicts_are_the_same_with_and_without_a_challenger(judge_seen: Callable[..., Judged]) -> None:
    objects: dict[str, bytes | Exception] = {str(value): png(value) for value in range(0, 250, 10)}
    objects["bad"] = b"no image"
    plain = judge_seen(objects, ShadowBatch(runtime(), runtime(), 0.0, Budget(0)))
    seen = judge_seen(objects, ShadowBatch(other_encoder(), runtime(), 1.0, Budget(MIB)))
    assert [replace(verdict, timings_ms={}) for verdict in seen.verdicts] == [
        replace(verdict, timings_ms={}) for verdict in plain.verdicts
    ]


def test_the_challenger_scores_with_the_verdicts_head_or_its_own_default(judge_seen: Callable[..., Judged]) -> None:
    for heads, used in (
        ({"svm": FirstValueHead(), "linear": FirstValueHead()}, "linear"),
        ({"svm": FirstValueHead()}, "svm"),
    ):
        challenger = other_encoder(**heads)
        batch = ShadowBatch(challenger, runtime(), 1.0, Budget(MIB))
        judge_seen({"a": png(51)}, batch, tenant="acme", content_type="avatar")
        (said,) = scores_of(batch, challenger)
        assert said == ShadowScore(
            job_id="a",
            revision=0,
            sha256=sha(png(51)),
            release="r-new",
            head=used,
            score=pytest.approx(0.8),
            label=Label.FAKE,
            champion="r-test",
            champion_head="linear",
            champion_score=pytest.approx(0.2),
            champion_label=Label.REAL,
            tenant="acme",
            content_type="avatar",
        )


def test_a_policy_holds_for_both_and_else_each_brings_its_own_thresholds(judge_seen: Callable[..., Judged]) -> None:
    champion = replace(runtime(), default_policy=Policy("r-test:thresholds", 0.1, 0.1))
    challenger = replace(other_encoder(), default_policy=Policy("r-new:thresholds", 0.85, 0.9))
    for policies, said in ((PolicyBook(), Label.REAL), (PolicyBook([Policy("all@1", 0.7, 0.9)]), Label.UNCERTAIN)):
        batch = ShadowBatch(challenger, champion, 1.0, Budget(MIB))
        judge_seen({"a": png(51)}, batch, champion=champion, policies=policies)
        assert [one.label for one in scores_of(batch, challenger)] == [said]


def test_a_head_that_fails_leaves_out_its_own_images_and_is_told_of(judge_seen: Callable[..., Judged]) -> None:
    challenger = other_encoder(linear=PickyHead(), knn=BrokenHead())
    batch = ShadowBatch(challenger, runtime(), 1.0, Budget(MIB))
    judge_seen({"dark": png(1), "bright": png(2)}, batch)
    bright = {sha(png(1)): np.full(192, 0.5, np.float32), sha(png(2)): np.full(192, 0.95, np.float32)}
    told: list[tuple[str, str, int]] = []
    found = shadow_scores(
        batch, bright, challenger, lambda head, error, images: told.append((head, type(error).__name__, images))
    )
    assert [one.job_id for one in found] == ["dark"]
    assert told == [("linear", "ZeroDivisionError", 2), ("linear", "ZeroDivisionError", 1)]
