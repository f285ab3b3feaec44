"""Shadow scores: one per job, revision and challenger; counted by labels, compared where people know."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from code_worker.store import jobs
from code_worker.store.engine import Store
from code_worker.store.ids import uuid7
from code_worker.store.learning import challenger_scores, labels
from code_worker.store.learning.challenger_scores import Disagreement, ShadowFilter, Tally
from code_worker.store.models import db_now
from code_worker.types import Label, ShadowScore
from tests.store.acts import accept, judged, write

HASHES = [character * 64 for character in "abcdef"]


def score(number: int, was: float, now: float, **more: object) -> ShadowScore:
    """What challenger r-2 says of the image with this number, beside champion r-1."""
    fields: dict[str, object] = {
        "job_id": uuid7(),
        "revision": 0,
        "sha256": HASHES[number],
        "release": "r-2",
        "head": "svm",
        "score": now,
        "label": Label.FAKE if now >= 0.5 else Label.REAL,
        "champion": "r-1",
        "champion_head": "linear",
        "champion_score": was,
        "champion_label": Label.FAKE if was >= 0.5 else Label.REAL,
        **more,
    }
    return ShadowScore(**fields)  # type: ignore[arg-type]


def add(store: Store, *scores: ShadowScore) -> None:
    accept(store, *(jobs.NewJob("s3://b/a.jpg", id=score.job_id) for score in scores))
    store.run(lambda session: challenger_scores.add(session, scores))


def tally(store: Store, **wanted: object) -> list[Tally]:
    chosen = ShadowFilter(**{"release": "r-2", **wanted})  # type: ignore[arg-type]
    return store.run(lambda session: challenger_scores.tally(session, chosen), write=False)


def test_of_a_job_and_revision_only_the_first_score_of_a_challenger_counts(store: Store) -> None:
    first = score(0, 0.1, 0.9)
    add(store, first)
    add(store, replace(first, score=0.2), replace(first, revision=1), replace(first, release="r-3"))
    (whole,) = tally(store)
    assert (whole.images, whole.shift) == (2, pytest.approx(1.6))
    assert sum(one.images for one in tally(store, release="r-3")) == 1
    assert store.run(challenger_scores.last, write=False) == "r-3"


def test_without_scores_there_is_no_last_challenger(store: Store) -> None:
    assert store.run(challenger_scores.last, write=False) is None
    assert tally(store) == []
    add(store)


def test_scores_are_counted_by_champion_scope_and_both_labels(store: Store) -> None:
    add(
        store,
        score(0, 0.1, 0.2, tenant="acme"),
        score(1, 0.2, 0.2, tenant="acme"),
        score(2, 0.1, 0.9, tenant="acme"),
        score(3, 0.9, 0.8, tenant="acme", content_type="avatar"),
        score(4, 0.9, 0.4, champion="r-0"),
    )
    found = {
        (one.champion, one.tenant, one.content_type, one.champion_label, one.label): (
            one.images,
            pytest.approx(one.shift),
        )
        for one in tally(store)
    }
    assert found == {
        ("r-1", "acme", None, Label.REAL, Label.REAL): (2, 0.1),
        ("r-1", "acme", None, Label.REAL, Label.FAKE): (1, 0.8),
        ("r-1", "acme", "avatar", Label.FAKE, Label.FAKE): (1, -0.1),
        ("r-0", None, None, Label.FAKE, Label.REAL): (1, -0.5),
    }
    assert [one.images for one in tally(store, content_type="avatar")] == [1]
    assert sum(one.images for one in tally(store, tenant="acme")) == 4


def test_the_time_of_scoring_can_be_bounded(store: Store) -> None:
    add(store, score(0, 0.1, 0.2))
    now = store.run(lambda session: session.scalar(db_now().select()), write=False)
    assert now is not None
    hour = timedelta(hours=1)
    assert tally(store, since=now + hour) == tally(store, until=now - hour) == []
    assert len(tally(store, since=now - hour, until=now + hour)) == 1


def test_disagreements_begin_with_other_labels_and_name_the_image(store: Store) -> None:
    (job,) = accept(store, "s3://b/a.jpg")
    write(store, judged(job, score=0.45))
    close = score(0, 0.45, 0.55, job_id=job)
    far = score(1, 0.05, 0.45)
    same = score(2, 0.5, 0.5)
    add(store, far, same, close, score(3, 0.1, 0.9, release="r-9"))

    def most(limit: int) -> list[Disagreement]:
        wanted = ShadowFilter("r-2")
        return store.run(lambda session: challenger_scores.disagreements(session, wanted, limit=limit), write=False)

    assert [(one.job_id, one.uri) for one in most(5)] == [(job, "s3://b/a.jpg"), (far.job_id, None)]
    (first,) = most(1)
    assert (first.champion_label, first.label) == (Label.REAL, Label.FAKE)
    assert (first.champion_head, first.head, first.score) == ("linear", "svm", 0.55)


def test_labelled_images_come_once_as_they_were_last_scored(store: Store) -> None:
    said = [labels.NewLabel(sha256, "fake", by="ann", source="api") for sha256 in HASHES[:2]]
    store.run(lambda session: labels.add(session, said))
    add(store, score(0, 0.1, 0.2))
    add(store, score(0, 0.1, 0.7), score(1, 0.9, 0.8), score(2, 0.9, 0.9))
    found = store.run(lambda session: challenger_scores.labelled(session, ShadowFilter("r-2")), write=False)
    assert found == {HASHES[0]: (Label.REAL, Label.FAKE), HASHES[1]: (Label.FAKE, Label.FAKE)}
