"""Verdicts: one per job and revision, complete, and never changed afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, timedelta

import pytest
from sqlalchemy import text

from code_worker.errors import StoreError
from code_worker.store import jobs, verdicts
from code_worker.store.engine import Store
from code_worker.store.ids import uuid7
from code_worker.types import JobState, Label, Outcome, RejectReason, Verdict
from tests.store.acts import accept, claim, info, judged, rejected, state, write


def live(store: Store, job_id: str) -> Verdict | None:
    return store.run(lambda session: verdicts.live(session, job_id), write=False)


def test_a_verdict_keeps_every_field(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    given = judged(job_id, score=0.1 + 0.2, tenant="acme", content_type="avatar", detail="ü")
    assert write(store, given) == [job_id]
    kept = live(store, job_id)
    assert kept is not None
    assert kept.id is not None
    assert kept.created_at is not None
    assert kept.created_at.tzinfo is UTC
    assert replace(kept, id=None, created_at=None) == given
    assert store.run(lambda session: verdicts.get(session, kept.id or "")) == kept


def test_a_rejection_has_a_reason_and_no_facts(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    write(store, rejected(job_id))
    kept = live(store, job_id)
    assert kept is not None
    assert (kept.outcome, kept.reason, kept.label, kept.facts) == (
        Outcome.REJECTED,
        RejectReason.TRUNCATED,
        None,
        None,
    )


def test_detail_from_outside_is_made_storable(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    write(store, replace(rejected(job_id), detail="\0\ud800" + "x" * 9000))
    kept = live(store, job_id)
    assert kept is not None
    assert kept.detail.startswith("\ufffd?xx")
    assert len(kept.detail) == 2000


def test_writing_finishes_the_jobs(store: Store) -> None:
    ids = accept(store, "s3://b/a", "s3://b/b", "s3://b/c", "s3://b/d")
    claim(store, ids[:3])
    write(store, judged(ids[0]), rejected(ids[1]), rejected(ids[2], RejectReason.QUARANTINED))
    assert [state(store, job_id) for job_id in ids] == [
        JobState.DONE,
        JobState.DONE,
        JobState.QUARANTINED,
        JobState.ACCEPTED,
    ]
    done = info(store, ids[0])
    assert (done.owner, done.due_at) == (None, None)
    assert done.finished_at is not None


def test_the_first_verdict_stays_and_the_second_is_not_reported(store: Store) -> None:
    ids = accept(store, "s3://b/a", "s3://b/b")
    assert write(store, judged(ids[0], score=0.9)) == [ids[0]]
    assert write(store, judged(ids[1]), judged(ids[0], score=0.1)) == [ids[1]]
    kept = live(store, ids[0])
    assert kept is not None
    assert kept.score == 0.9


def test_the_first_of_two_in_one_call_counts(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    assert write(store, judged(job_id, score=0.9), judged(job_id, score=0.1)) == [job_id]
    kept = live(store, job_id)
    assert kept is not None
    assert kept.score == 0.9


def test_racing_workers_write_one_verdict_per_job(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(60)))

    def race(worker: int) -> list[str]:
        order = ids if worker % 2 else ids[::-1]
        return write(store, *(judged(job_id, score=worker / 10) for job_id in order))

    with ThreadPoolExecutor(4) as pool:
        written = [job_id for got in pool.map(race, range(4)) for job_id in got]
    assert sorted(written) == sorted(ids)
    assert len(store.run(lambda session: verdicts.list_verdicts(session, limit=1000))) == 60


def test_a_retried_job_gets_a_verdict_of_the_next_revision(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    write(store, rejected(job_id))
    assert store.run(lambda session: jobs.retry(session, [job_id])) == [job_id]
    old = live(store, job_id)
    assert old is not None
    assert old.revision == 0
    (again,) = claim(store, [job_id])
    assert again.revision == 1
    assert write(store, judged(job_id, revision=1)) == [job_id]
    new = live(store, job_id)
    assert new is not None
    assert (new.revision, new.outcome) == (1, Outcome.JUDGED)
    assert state(store, job_id) is JobState.DONE


def test_a_late_verdict_of_an_old_revision_does_not_finish_the_retried_job(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    write(store, rejected(job_id))
    store.run(lambda session: jobs.retry(session, [job_id]))
    assert write(store, judged(job_id, revision=0)) == []
    assert state(store, job_id) is JobState.ACCEPTED


def test_a_verdict_of_no_job_is_left_out_and_said_so(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    (job_id,) = accept(store, "s3://b/a.jpg")
    gone = uuid7()
    with caplog.at_level("WARNING"):
        assert write(store, judged(gone), judged(job_id)) == [job_id]
    assert "verdicts_dropped" in caplog.text
    assert gone in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": None},
        {"reason": RejectReason.EMPTY},
        {"outcome": Outcome.REJECTED, "reason": RejectReason.EMPTY},
        {"score": 1.5},
        {"score": -0.1},
        {"score": None},
    ],
)
def test_the_database_refuses_a_verdict_that_contradicts_itself(store: Store, wrong: dict[str, object]) -> None:
    (job_id,) = accept(store, "s3://b/a")
    with pytest.raises(StoreError, match="refused"):
        write(store, replace(judged(job_id), **wrong))  # type: ignore[arg-type]
    assert state(store, job_id) is JobState.ACCEPTED


@pytest.mark.parametrize("change", ["score = 0.1", "label = 'real'", "detail = detail", "created_at = created_at"])
def test_the_database_refuses_to_change_a_verdict(store: Store, change: str) -> None:
    (job_id,) = accept(store, "s3://b/a")
    write(store, judged(job_id))
    before = live(store, job_id)
    with pytest.raises(StoreError, match="verdicts are immutable"):
        store.run(lambda session: session.execute(text(f"UPDATE verdicts SET {change}")))
    assert live(store, job_id) == before


def test_unknown_ids_have_no_verdict(store: Store) -> None:
    for unknown in ("", "no id", uuid7()):
        assert live(store, unknown) is None
        assert store.run(lambda session, unknown=unknown: verdicts.get(session, unknown)) is None


def test_pages_are_stable_while_verdicts_come_in(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(12)))
    write(store, *(judged(job_id) for job_id in ids[:9]))

    def page(after: str | None, *, newest_first: bool) -> list[Verdict]:
        return store.run(
            lambda session: verdicts.list_verdicts(session, after=after, limit=4, newest_first=newest_first)
        )

    first = page(None, newest_first=True)
    write(store, *(judged(job_id) for job_id in ids[9:]))
    second = page(first[-1].id, newest_first=True)
    third = page(second[-1].id, newest_first=True)
    assert [len(first), len(second), len(third)] == [4, 4, 1]
    assert {verdict.job_id for verdict in [*first, *second, *third]} == set(ids[:9])
    oldest = page(None, newest_first=False)
    assert [verdict.id for verdict in oldest] == sorted(verdict.id or "" for verdict in oldest)
    assert oldest[0] == third[-1]
    with pytest.raises(StoreError, match="no id"):
        page("what", newest_first=True)


def test_a_stream_gives_every_verdict_once_in_order(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(25)))
    write(store, *(judged(job_id) for job_id in ids))
    streamed = [verdict.job_id for verdict in verdicts.stream(store, page=10)]
    assert sorted(streamed) == sorted(ids)
    assert [verdict.job_id for verdict in verdicts.stream(store, page=5, newest_first=True)] == streamed[::-1]
    assert list(verdicts.stream(store, verdicts.VerdictFilter(label=Label.REAL))) == []


def test_each_filter_finds_its_own(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(4)))
    write(
        store,
        judged(ids[0], score=0.9, uri="s3://b/X_%1", tenant="acme", content_type="avatar"),
        judged(ids[1], score=0.2, uri="s3://b/x_%1"),
        rejected(ids[2]),
        rejected(ids[3], RejectReason.EMPTY),
    )
    store.run(lambda session: jobs.retry(session, [ids[3]]))
    write(store, replace(judged(ids[3], score=0.6, revision=1), facts=None))

    def found(**wanted: object) -> list[int]:
        filter_ = verdicts.VerdictFilter(**wanted)  # type: ignore[arg-type]
        some = store.run(lambda session: verdicts.list_verdicts(session, filter_, limit=9, newest_first=False))
        return sorted(ids.index(verdict.job_id) for verdict in some)

    assert found() == [0, 1, 2, 3]
    assert found(live_only=False) == [0, 1, 2, 3, 3]
    assert found(outcome=Outcome.REJECTED) == [2]
    assert found(label=Label.FAKE) == [0, 3]
    assert found(reason=RejectReason.EMPTY) == []
    assert found(reason=RejectReason.EMPTY, live_only=False) == [3]
    assert found(tenant="acme") == found(content_type="avatar") == [0]
    assert found(release="release-1") == found(head="linear") == [0, 1, 3]
    assert found(sha256="a" * 64) == [0, 1]
    assert found(uri_prefix="s3://b/X_%") == [0]
    assert found(score_min=0.6) == [0, 3]
    assert found(score_max=0.6) == [1, 3]
    first = live(store, ids[0])
    assert first is not None
    assert first.created_at is not None
    assert found(since=first.created_at) == [0, 1, 2, 3]
    assert found(until=first.created_at) == []
    assert found(since=first.created_at + timedelta(hours=1)) == []
