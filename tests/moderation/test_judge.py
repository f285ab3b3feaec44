"""Judging a batch: every job ends in a verdict or a fault of its own."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from code_worker.errors import ImageRejectedError, SourceCredentialsError, SourcePausedError, TransientError
from code_worker.moderation import image_tasks, pipeline
from code_worker.moderation.judge import Judge, Judged
from code_worker.moderation.policy import Policy, PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.settings import LimitSettings
from code_worker.types import Fetched, Job, Label, Outcome, RejectReason
from tests.moderation.doubles import (
    BrokenHead,
    DictSources,
    FirstValueHead,
    MeanEmbedder,
    PickyHead,
    QuittingHead,
    ShoutingHead,
    png,
    runtime,
)


class OneAfterTheOther(DictSources):
    """Objects arrive a moment apart, as over a network."""

    def __init__(self, objects: Mapping[str, bytes | Exception]) -> None:
        super().__init__(objects)
        self._turn = threading.Lock()

    def fetch(self, uri: str) -> Fetched:
        with self._turn:
            time.sleep(0.002)
            return super().fetch(uri)


@pytest.fixture
def pool() -> Iterator[PriorityPool]:
    with PriorityPool(4) as pool:
        yield pool


@pytest.fixture
def judge_objects(pool: PriorityPool) -> Callable[..., Judged]:
    def judge(objects: Mapping[str, bytes | Exception], **options: Any) -> Judged:
        policies = options.pop("policies", PolicyBook())
        with_runtime = options.pop("runtime", None) or runtime()
        job_options: dict[str, dict[str, Any]] = options.pop("jobs", {})
        jobs = [Job(id=uri, uri=uri, **job_options.get(uri, {})) for uri in objects]
        judge = Judge(sources=DictSources(objects), pool=pool, limits=LimitSettings(), **options)
        return judge.judge(jobs, with_runtime, policies)

    return judge


def _by_job(judged: Judged) -> dict[str, Any]:
    return {verdict.job_id: verdict for verdict in judged.verdicts}


def test_a_verdict_carries_what_an_appeal_needs(judge_objects: Callable[..., Judged]) -> None:
    data = png(200, size=300)
    (verdict,) = judge_objects({"a": data}).verdicts
    assert (verdict.outcome, verdict.label) == (Outcome.JUDGED, Label.FAKE)
    assert verdict.score == pytest.approx(200 / 255)
    assert verdict.facts is not None
    assert verdict.facts.sha256 == hashlib.sha256(data).hexdigest()
    assert (verdict.facts.format, verdict.facts.width, verdict.facts.mode) == ("png", 300, "RGB")
    assert verdict.facts.etag == "etag-a"
    assert verdict.provenance.release == "r-test"
    assert verdict.provenance.head == "linear"
    assert (verdict.provenance.policy, verdict.provenance.low, verdict.provenance.high) == ("published", 0.5, 0.5)
    assert verdict.provenance.manifest_sha256 == "m" * 64
    assert set(verdict.timings_ms) == {"fetch", "decode", "encode"}


def test_bad_images_do_not_touch_their_neighbours(judge_objects: Callable[..., Judged]) -> None:
    good = {f"good-{value}": png(value) for value in range(40)}
    bad: dict[str, bytes | Exception] = {
        "text": b"this is not an image",
        "cut": png(7)[:60],
        "gone": ImageRejectedError(RejectReason.NOT_FOUND, "no such key"),
        "slow": TransientError(RejectReason.FETCH_TIMEOUT, "30 s"),
        "bug": RuntimeError("a decoder's bug"),
    }
    judged = judge_objects({**good, **bad})
    verdicts = _by_job(judged)
    for uri, data in good.items():
        assert verdicts[uri].outcome is Outcome.JUDGED, (uri, data)
        assert verdicts[uri].score == pytest.approx(int(uri.split("-")[1]) / 255)
    assert verdicts["text"].reason is RejectReason.UNSUPPORTED_FORMAT
    assert verdicts["cut"].reason in {RejectReason.TRUNCATED, RejectReason.CORRUPT}
    assert verdicts["gone"].reason is RejectReason.NOT_FOUND
    assert {(fault.job.id, fault.reason, fault.blame) for fault in judged.faults} == {
        ("slow", RejectReason.FETCH_TIMEOUT, True),
        ("bug", RejectReason.MODEL_UNAVAILABLE, True),
    }


def test_failed_credentials_name_their_source_and_blame_no_job(judge_objects: Callable[..., Judged]) -> None:
    judged = judge_objects(
        {
            "a": SourceCredentialsError("s3://uploads", "ExpiredToken"),
            "b": SourcePausedError("s3://uploads", 40.0, "its credentials do not work"),
        }
    )
    assert not judged.verdicts
    assert {(fault.job.id, fault.source, fault.blame, fault.wait_s) for fault in judged.faults} == {
        ("a", "s3://uploads", False, None),
        ("b", None, False, 40.0),
    }


def test_images_that_arrive_soon_after_each_other_are_looked_up_together(
    pool: PriorityPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_LINGER_S", 30.0)  # so that only the number of images counts here
    asked: list[int] = []

    def known(encoder: str, hashes: Sequence[str]) -> Mapping[str, bytes]:
        asked.append(len(hashes))
        return {}

    sources = OneAfterTheOther({str(value): png(value) for value in range(10, 26)})
    judge = Judge(sources=sources, pool=pool, limits=LimitSettings(), known=known)
    judged = judge.judge([Job(id=uri, uri=uri) for uri in sources.objects], runtime(), PolicyBook())
    assert len(judged.verdicts) == sum(asked) == 16
    assert len(asked) <= 16 / pool.size


def test_an_image_that_has_arrived_does_not_wait_for_one_that_hangs(pool: PriorityPool) -> None:
    looked_up = threading.Event()

    class Hanging(DictSources):
        def fetch(self, uri: str) -> Fetched:
            if uri == "late" and not looked_up.wait(120):
                raise TransientError(RejectReason.FETCH_TIMEOUT, "nobody looked the other image up")
            return super().fetch(uri)

    def known(encoder: str, hashes: Sequence[str]) -> Mapping[str, bytes]:
        looked_up.set()
        return {}

    sources = Hanging({"early": png(10), "late": png(20)})
    judge = Judge(sources=sources, pool=pool, limits=LimitSettings(), known=known)
    judged = judge.judge([Job(id=uri, uri=uri) for uri in sources.objects], runtime(), PolicyBook())
    assert not judged.faults
    assert len(judged.verdicts) == 2


def test_known_embeddings_are_not_computed_again(judge_objects: Callable[..., Judged]) -> None:
    data, embedder = png(10), MeanEmbedder()
    stored = {hashlib.sha256(data).hexdigest(): np.full(192, 0.9, dtype="<f4").tobytes()}
    asked: list[tuple[str, Sequence[str]]] = []

    def known(encoder: str, hashes: Sequence[str]) -> Mapping[str, bytes]:
        asked.append((encoder, hashes))
        return {name: stored[name] for name in hashes if name in stored}

    judged = judge_objects({"old": data, "new": png(20)}, known=known, runtime=runtime(embedder))
    verdicts = _by_job(judged)
    assert verdicts["old"].score == pytest.approx(0.9)
    assert (verdicts["old"].facts.format, verdicts["old"].facts.width, verdicts["old"].facts.etag) == (
        "png",
        224,
        "etag-old",
    )
    assert verdicts["new"].score == pytest.approx(20 / 255)
    assert embedder.crops == 1
    assert {encoder for encoder, _ in asked} == {"e" * 64}
    assert set(judged.embeddings) == {hashlib.sha256(png(20)).hexdigest()}


def test_limits_hold_for_images_that_were_judged_before_they_were_set(pool: PriorityPool) -> None:
    data = png(10, size=300)
    stored = {hashlib.sha256(data).hexdigest(): np.full(192, 0.9, dtype="<f4").tobytes()}
    judge = Judge(
        sources=DictSources({"a": data}),
        pool=pool,
        limits=LimitSettings(max_pixels=200 * 200),
        known=lambda encoder, hashes: stored,
    )
    (verdict,) = judge.judge([Job("a", "a")], runtime(), PolicyBook()).verdicts
    assert verdict.reason is RejectReason.TOO_MANY_PIXELS


def test_the_same_bytes_twice_in_a_batch_are_encoded_once(judge_objects: Callable[..., Judged]) -> None:
    embedder = MeanEmbedder()
    judged = judge_objects({str(number): png(99) for number in range(20)}, runtime=runtime(embedder))
    assert [verdict.score for verdict in judged.verdicts] == [pytest.approx(99 / 255)] * 20
    assert {verdict.facts.width for verdict in judged.verdicts if verdict.facts} == {224}
    assert embedder.crops == 1


def test_bad_bytes_twice_in_a_batch_are_both_rejected(judge_objects: Callable[..., Judged]) -> None:
    judged = judge_objects({str(number): b"junk" for number in range(20)})
    assert {verdict.reason for verdict in judged.verdicts} == {RejectReason.UNSUPPORTED_FORMAT}
    assert len(judged.verdicts) == 20


def test_a_crop_that_the_encoder_cannot_take_leaves_the_others(judge_objects: Callable[..., Judged]) -> None:
    spoil = MeanEmbedder(lambda crop: RuntimeError("device") if crop.mean() > 250 else None)
    judged = judge_objects({"good": png(1), "poison": png(255)}, runtime=runtime(spoil))
    assert [verdict.job_id for verdict in judged.verdicts] == ["good"]
    assert [(fault.job.id, fault.reason) for fault in judged.faults] == [("poison", RejectReason.MODEL_UNAVAILABLE)]


def test_an_encoder_that_is_gone_puts_its_jobs_back(judge_objects: Callable[..., Judged]) -> None:
    class Gone(MeanEmbedder):
        def submit(self, crop: Any, priority: int = 4, turn: int = 0) -> Any:
            raise TransientError(RejectReason.MODEL_UNAVAILABLE, "the device failed")

    judged = judge_objects({"a": png(5), "b": png(6), "same as a": png(5)}, runtime=runtime(Gone()))
    assert not judged.verdicts
    assert {fault.job.id for fault in judged.faults} == {"a", "b", "same as a"}


def test_waiting_for_ones_turn_counts_as_a_sign_of_life(
    judge_objects: Callable[..., Judged], pool: PriorityPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_LOOK_S", 0.02)
    release, signs = threading.Event(), []
    for _ in range(pool.size):
        pool.submit((-9,), partial(release.wait, 120))
    judge = Judge(sources=DictSources({"a": png(1)}), pool=pool, limits=LimitSettings())
    waiting = threading.Thread(
        target=judge.judge, args=([Job("a", "a")], runtime(), PolicyBook(), lambda: signs.append(1))
    )
    waiting.start()
    while len(signs) < 3:
        time.sleep(0.01)
    release.set()
    waiting.join(120)
    assert not waiting.is_alive()


def test_an_image_that_hangs_gives_no_sign_of_life(pool: PriorityPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_LOOK_S", 0.02)
    release, signs, began = threading.Event(), [], threading.Event()

    class Hanging(DictSources):
        def fetch(self, uri: str) -> Any:
            began.set()
            release.wait(120)
            return super().fetch(uri)

    judge = Judge(sources=Hanging({"a": png(1)}), pool=pool, limits=LimitSettings())
    hanging = threading.Thread(
        target=judge.judge, args=([Job("a", "a")], runtime(), PolicyBook(), lambda: signs.append(1))
    )
    hanging.start()
    assert began.wait(120)
    before = len(signs)
    time.sleep(0.2)
    assert len(signs) == before
    release.set()
    hanging.join(120)


def test_an_embedding_that_is_not_finite_is_refused(judge_objects: Callable[..., Judged]) -> None:
    class NanEmbedder(MeanEmbedder):
        def submit(self, crop: Any, priority: int = 4, turn: int = 0) -> Any:
            future = super().submit(crop, priority, turn)
            future.result()[3] = np.nan
            return future

    (verdict,) = judge_objects({"a": png(5)}, runtime=runtime(NanEmbedder())).verdicts
    assert verdict.reason is RejectReason.INTERNAL
    assert "not finite" in verdict.detail


def test_an_unknown_head_is_refused_by_name(judge_objects: Callable[..., Judged]) -> None:
    verdicts = _by_job(judge_objects({"a": png(5), "b": png(5)}, jobs={"a": {"head": "nope"}}))
    assert verdicts["a"].reason is RejectReason.MODEL_UNAVAILABLE
    assert "'nope'" in verdicts["a"].detail
    assert "knn, linear" in verdicts["a"].detail
    assert verdicts["b"].outcome is Outcome.JUDGED


def test_the_head_comes_from_job_then_plugin_then_policy_then_default(judge_objects: Callable[..., Judged]) -> None:
    heads = runtime(**{name: FirstValueHead() for name in ("default", "by_policy", "by_plugin", "by_job")})
    verdicts = _by_job(
        judge_objects(
            {"job": png(1), "plugin": png(1), "policy": png(1), "none": png(1)},
            runtime=heads,
            jobs={
                "job": {"head": "by_job", "tenant": "t", "metadata": {"vip": True}},
                "plugin": {"tenant": "t", "metadata": {"vip": True}},
                "policy": {"tenant": "t"},
            },
            select_head=lambda job, names: "by_plugin" if job.metadata.get("vip") else None,
            policies=PolicyBook([Policy("t@1", 0.2, 0.8, head="by_policy", tenant="t")]),
        )
    )
    assert {job: verdict.head for job, verdict in verdicts.items()} == {
        "job": "by_job",
        "plugin": "by_plugin",
        "policy": "by_policy",
        "none": "default",
    }


def test_a_plugin_that_cannot_select_leaves_the_job_for_later(judge_objects: Callable[..., Judged]) -> None:
    def broken(job: Job, names: Sequence[str]) -> str | None:
        raise LookupError("table is gone")

    judged = judge_objects({"a": png(1)}, select_head=broken)
    assert not judged.verdicts
    assert judged.faults[0].reason is RejectReason.MODEL_UNAVAILABLE
    assert judged.faults[0].detail == "no head could be chosen: LookupError: table is gone"


def test_a_head_spoils_no_more_than_its_own_images(judge_objects: Callable[..., Judged]) -> None:
    objects = {"dark": png(1), "bright": png(254), "broken-1": png(2), "broken-2": png(3), "shout": png(4)}
    jobs = {
        "dark": {"head": "picky"},
        "bright": {"head": "picky"},
        "broken-1": {"head": "broken"},
        "broken-2": {"head": "broken"},
        "shout": {"head": "shouting"},
    }
    heads = runtime(picky=PickyHead(), broken=BrokenHead(), shouting=ShoutingHead())
    judged = judge_objects(objects, jobs=jobs, runtime=heads)
    verdicts = _by_job(judged)
    assert verdicts["dark"].outcome is Outcome.JUDGED
    assert verdicts["bright"].reason is RejectReason.INTERNAL
    assert "ZeroDivisionError: too bright" in verdicts["bright"].detail
    details = {fault.job.id: fault.detail for fault in judged.faults}
    assert "7.0" in details["shout"]
    assert {(fault.job.id, fault.reason) for fault in judged.faults} == {
        ("shout", RejectReason.MODEL_UNAVAILABLE),
        ("broken-1", RejectReason.MODEL_UNAVAILABLE),
        ("broken-2", RejectReason.MODEL_UNAVAILABLE),
    }


def test_a_head_that_calls_exit_is_a_failure_of_that_head(judge_objects: Callable[..., Judged]) -> None:
    jobs = {"quit-1": {"head": "quitting"}, "quit-2": {"head": "quitting"}, "good": {}}
    heads = runtime(linear=FirstValueHead(), quitting=QuittingHead())
    judged = judge_objects({name: png(seed) for seed, name in enumerate(jobs)}, jobs=jobs, runtime=heads)
    assert {verdict.job_id for verdict in judged.verdicts} == {"good"}
    assert {fault.job.id: fault.detail for fault in judged.faults} == dict.fromkeys(
        ("quit-1", "quit-2"), "head 'quitting' failed: SystemExit: no licence"
    )


def test_a_release_brings_its_own_thresholds_for_what_no_policy_covers(judge_objects: Callable[..., Judged]) -> None:
    strict = replace(runtime(), default_policy=Policy("r-test:thresholds", 0.6, 0.9))
    judged = judge_objects(
        {"covered": png(150), "open": png(150)},
        runtime=strict,
        jobs={"covered": {"tenant": "t"}},
        policies=PolicyBook([Policy("t@1", 0.5, 0.5, tenant="t")]),
    )
    assert {verdict.job_id: (verdict.label, verdict.provenance.policy) for verdict in judged.verdicts} == {
        "covered": (Label.FAKE, "t@1"),
        "open": (Label.REAL, "r-test:thresholds"),
    }


def test_thresholds_decide_the_label(judge_objects: Callable[..., Judged]) -> None:
    judged = judge_objects(
        {"low": png(20), "middle": png(128), "high": png(240)},
        policies=PolicyBook([Policy("all@1", 0.3, 0.8)]),
    )
    assert {verdict.job_id: verdict.label for verdict in judged.verdicts} == {
        "low": Label.REAL,
        "middle": Label.UNCERTAIN,
        "high": Label.FAKE,
    }


@pytest.mark.parametrize("size", [0, 1, 2047, 2048, 5000, 2**16, 2**16 + 1])
def test_content_is_hashed_whole_at_any_size(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert image_tasks._sha256(data) == hashlib.sha256(data).hexdigest()
