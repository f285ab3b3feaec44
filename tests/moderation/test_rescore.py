"""Judging history again: from stored embeddings, from sources, from copies; the same answer is not given twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from code_worker.errors import ArtifactError, DatasetError, SourceCredentialsError, TransientError
from code_worker.moderation.policy import Policy, PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.rescore import Judged, Rejudged, Rescorer, rescore
from code_worker.moderation.runtime import Runtime
from code_worker.settings import LimitSettings
from code_worker.types import ImageFacts, Job, Label, Outcome, Provenance, RejectReason, Verdict
from tests.moderation.doubles import BrokenHead, DictSources, FirstValueHead, MeanEmbedder, PickyHead, png, runtime


class Kept:
    """Copies by content hash; None: listed, but damaged."""

    def __init__(self, *images: bytes) -> None:
        self.images: dict[str, bytes | None] = {sha(image): image for image in images}
        self.reads: list[str] = []

    def among(self, hashes: Sequence[str]) -> Collection[str]:
        return self.images.keys() & set(hashes)

    def read(self, sha256: str) -> bytes:
        self.reads.append(sha256)
        if (image := self.images[sha256]) is None:
            raise DatasetError(f"{sha256} is damaged")
        return image


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(*values: int) -> dict[str, bytes]:
    """The embeddings that `MeanEmbedder` makes of grey images."""
    return {sha(png(value)): np.full(192, value / 255, "<f4").tobytes() for value in values}


def history(value: int, *, score: float = 0.9, **job: Any) -> Judged:
    """An image that an older release held to be this."""
    uri = job.pop("uri", f"s3://b/{value}")
    made = Job(f"job-{value}", uri, revision=1, **job)
    old = Verdict(
        made.id,
        uri,
        Outcome.JUDGED,
        Label.FAKE if score >= 0.5 else Label.REAL,
        score,
        facts=ImageFacts(sha(png(value)), 10, "png", 224, 224, "RGB", etag="then"),
        provenance=Provenance("r-old", "o" * 64, "linear", "p" * 64, "published", 0.5, 0.5, "1"),
        id=f"verdict-{value}",
    )
    return made, old


@pytest.fixture
def pool() -> Iterator[PriorityPool]:
    with PriorityPool(4) as pool:
        yield pool


@pytest.fixture
def rescorer(pool: PriorityPool) -> Callable[..., Rescorer]:
    def make(
        objects: Mapping[str, bytes | Exception] | None = None,
        known: Mapping[str, bytes] | None = None,
        *,
        with_runtime: Runtime | None = None,
        kept: Kept | None = None,
        policies: PolicyBook | None = None,
        **options: Any,
    ) -> Rescorer:
        return Rescorer(
            with_runtime or runtime(release="r-new"),
            policies or PolicyBook(),
            sources=DictSources(objects or {}),
            pool=pool,
            limits=LimitSettings(),
            known=lambda encoder, hashes: {name: (known or {})[name] for name in hashes if name in (known or {})},
            copies=kept or Kept(),
            select_head=options.pop("select_head", lambda job, names: None),
            **options,
        )

    return make


def test_a_stored_embedding_is_enough(rescorer: Callable[..., Rescorer]) -> None:
    embedder = MeanEmbedder()
    result = rescorer(known=stored(51), with_runtime=runtime(embedder, release="r-new")).judge([history(51)])
    ((old, new),) = result.pairs
    assert (new.label, new.score, new.revision, new.supersedes) == (
        Label.REAL,
        pytest.approx(0.2),
        1,
        "verdict-51",
    )
    assert new.facts == old.facts, "what was judged stays what it was"
    assert (new.release, new.head, new.provenance.policy) == ("r-new", "linear", "published")
    assert (embedder.crops, result.embeddings, result.left) == (0, {}, {})


def test_without_one_the_image_is_fetched_again_and_its_embedding_kept(rescorer: Callable[..., Rescorer]) -> None:
    result = rescorer({"s3://b/51": png(51)}, stored(102)).judge([history(51), history(102)])
    assert {old.id: new.score for old, new in result.pairs} == {
        "verdict-51": pytest.approx(0.2),
        "verdict-102": pytest.approx(0.4),
    }
    fetched = next(new for old, new in result.pairs if old.id == "verdict-51")
    assert fetched.facts is not None
    assert (fetched.facts.sha256, fetched.facts.etag) == (sha(png(51)), "etag-s3://b/51")
    assert result.embeddings == stored(51)


def test_other_bytes_at_the_source_are_never_judged_in_place_of_the_old(rescorer: Callable[..., Rescorer]) -> None:
    objects: dict[str, bytes | Exception] = {
        "s3://b/1": png(200),
        "s3://b/2": TransientError(RejectReason.FETCH_TIMEOUT, "30 s"),
        "s3://b/3": RuntimeError("a decoder's bug"),
        "s3://b/4": png(4),
    }
    embedder = MeanEmbedder()
    made = rescorer(objects, with_runtime=runtime(embedder, release="r-new"))
    result = made.judge([history(number) for number in (1, 2, 3, 4)])
    assert [old.id for old, _ in result.pairs] == ["verdict-4"]
    assert result.left == {"content_changed": 1, "fetch_timeout": 1, "internal": 1}
    assert embedder.crops == 1


def test_two_contents_that_one_address_had_are_told_apart(rescorer: Callable[..., Rescorer]) -> None:
    objects = {"s3://b/a": png(20)}
    result = rescorer(objects).judge([history(10, uri="s3://b/a"), history(20, uri="s3://b/a")])
    assert [(old.id, new.score) for old, new in result.pairs] == [("verdict-20", pytest.approx(20 / 255))]
    assert result.left == {"content_changed": 1}


def test_a_kept_copy_stands_in_for_a_source_that_lost_the_image(rescorer: Callable[..., Rescorer]) -> None:
    objects = {"s3://b/51": png(200), "s3://b/52": RuntimeError("gone"), "s3://b/53": png(53)}
    kept = Kept(png(51), png(53))
    kept.images[sha(png(52))] = None
    result = rescorer(objects, kept=kept).judge([history(number) for number in (51, 52, 53)])
    assert sorted(old.id or "" for old, _ in result.pairs) == ["verdict-51", "verdict-53"]
    (new,) = (new for old, new in result.pairs if old.id == "verdict-51")
    assert new.score == pytest.approx(0.2)
    assert (new.uri, new.facts.etag if new.facts else None) == ("s3://b/51", "then")
    assert result.left == {"internal": 1}
    assert set(kept.reads) == {sha(png(51)), sha(png(52))}, "only what the source does not have"
    assert set(result.embeddings) == {sha(png(51)), sha(png(53))}


def test_what_was_said_already_is_not_said_again(rescorer: Callable[..., Rescorer]) -> None:
    first = rescorer(known=stored(51, 102)).judge([history(51), history(102)])
    later = [(Job(new.job_id, new.uri, revision=2), new) for _, new in first.pairs]
    again = rescorer(known=stored(51, 102)).judge(later)
    assert (again.pairs, again.unchanged) == ([], 2)
    for change in (
        {"policies": PolicyBook([Policy("all@1", 0.1, 0.8)])},
        {"head": "knn"},
        {"with_runtime": runtime(release="r-newer")},
        {"with_runtime": replace(runtime(release="r-new"), head_sha256={"linear": "x" * 64})},
    ):
        changed = rescorer(known=stored(51, 102), **change).judge(later)
        assert (len(changed.pairs), changed.unchanged) == (2, 0), change


def test_thresholds_of_today_decide_the_label(rescorer: Callable[..., Rescorer]) -> None:
    book = PolicyBook([Policy("acme@2", 0.1, 0.6, tenant="acme")])
    result = rescorer(known=stored(51, 52), policies=book).judge([history(51, tenant="acme"), history(52)])
    assert {old.id: (new.label, new.provenance.policy) for old, new in result.pairs} == {
        "verdict-51": (Label.UNCERTAIN, "acme@2"),
        "verdict-52": (Label.REAL, "published"),
    }


def test_the_head_is_chosen_as_for_a_job(rescorer: Callable[..., Rescorer]) -> None:
    heads = {name: FirstValueHead() for name in ("default", "by_job", "by_plugin", "by_hand")}
    some = [history(1, head="by_job"), history(2, metadata={"vip": True}), history(3), history(4, head="gone")]
    options: dict[str, Any] = {
        "with_runtime": runtime(release="r-new", **heads),
        "select_head": lambda job, names: "by_plugin" if job.metadata.get("vip") else None,
    }
    result = rescorer(known=stored(1, 2, 3, 4), **options).judge(some)
    assert [new.head for _, new in sorted(result.pairs, key=lambda pair: pair[0].job_id)] == [
        *("by_job", "by_plugin", "default"),
    ]
    assert result.left == {"head_missing": 1}
    forced = rescorer(known=stored(1, 2, 3, 4), head="by_hand", **options).judge(some)
    assert {new.head for _, new in forced.pairs} == {"by_hand"}


def test_a_plugin_that_cannot_select_leaves_its_jobs_alone(rescorer: Callable[..., Rescorer]) -> None:
    def broken(job: Job, names: Sequence[str]) -> str | None:
        if job.id == "job-1":
            raise LookupError("table is gone")
        return None

    result = rescorer(known=stored(1, 2), select_head=broken).judge([history(1), history(2)])
    assert [old.id for old, _ in result.pairs] == ["verdict-2"]
    assert result.left == {"select_head_failed": 1}


def test_a_head_spoils_only_what_it_cannot_take_unless_that_is_everything(rescorer: Callable[..., Rescorer]) -> None:
    picky = rescorer(known=stored(1, 250), with_runtime=runtime(release="r-new", linear=PickyHead()))
    result = picky.judge([history(1), history(250)])
    assert [old.id for old, _ in result.pairs] == ["verdict-1"]
    assert result.left == {"head_failed": 1}
    broken = rescorer(known=stored(1, 2), with_runtime=runtime(release="r-new", linear=BrokenHead()))
    with pytest.raises(ArtifactError, match=r"r-new cannot judge history: .*KeyError"):
        broken.judge([history(1), history(2)])


def test_an_encoder_that_cannot_be_used_ends_the_work(rescorer: Callable[..., Rescorer]) -> None:
    lost = MeanEmbedder(lambda _: TransientError(RejectReason.MODEL_UNAVAILABLE, "the device failed"))
    lost.failure = RuntimeError("CUDA error")
    with pytest.raises(ArtifactError, match="the encoder of r-new cannot be used here: CUDA error"):
        rescorer({"s3://b/1": png(1)}, with_runtime=runtime(lost, release="r-new")).judge([history(1)])


def written(rejudged: Rejudged) -> set[str]:
    return {new.job_id for _, new in rejudged.pairs}


def test_history_is_counted_by_labels_before_and_after(rescorer: Callable[..., Rescorer]) -> None:
    pages = [[history(51), history(204)], [history(102, score=0.3), history(3)], [history(255)]]
    moved: list[int] = []
    tally = rescore(
        pages,
        rescorer({"s3://b/3": png(4)}, stored(51, 204, 102, 255)),
        lambda rejudged: written(rejudged) - {"job-255"},
        progress=moved.append,
    )
    assert moved == [2, 2, 1]
    found = tally.to_dict()
    assert (found["examined"], found["rescored"], found["unchanged"]) == (5, 3, 0)
    assert found["left"] == {"content_changed": 1, "moved_on": 1}
    assert found["transitions"]["fake"] == {"real": 1, "fake": 1, "uncertain": 0}
    assert found["transitions"]["real"] == {"real": 1, "fake": 0, "uncertain": 0}
    assert found["mean_shift"] == pytest.approx((0.2 + 0.8 + 0.4 - 0.9 - 0.9 - 0.3) / 3)


def test_a_limit_counts_new_verdicts(rescorer: Callable[..., Rescorer]) -> None:
    pages = [[history(1), history(2), history(3)], [history(4), history(5)], [history(6)]]
    made = rescorer(known=stored(*range(7)))
    done: list[str] = []

    def write(rejudged: Rejudged) -> set[str]:
        done.extend(written(rejudged))
        return written(rejudged)

    assert rescore(pages, made, write, limit=4).rescored == 4
    assert sorted(done) == ["job-1", "job-2", "job-3", "job-4"]
    assert rescore([], made, write).to_dict()["mean_shift"] is None


def test_refused_credentials_end_the_work_after_what_could_be_judged(rescorer: Callable[..., Rescorer]) -> None:
    made = rescorer({"s3://b/1": SourceCredentialsError("s3://b", "ExpiredToken")}, stored(2, 3))
    done: list[str] = []

    def write(rejudged: Rejudged) -> set[str]:
        done.extend(written(rejudged))
        return written(rejudged)

    with pytest.raises(SourceCredentialsError, match="ExpiredToken"):
        rescore([[history(1), history(2)], [history(3)]], made, write)
    assert done == ["job-2"]
