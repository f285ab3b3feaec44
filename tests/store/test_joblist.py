"""Looking at jobs, and retrying them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from code_worker.errors import StoreError
from code_worker.store import jobs
from code_worker.store.engine import Session, Store
from code_worker.store.ids import uuid7
from code_worker.store.models import JobRow
from code_worker.store.sql import table_of
from code_worker.types import JobState, RejectReason
from tests.store.acts import accept, claim, info, judged, rejected, state, write

JOBS = table_of(JobRow)


def listed(
    store: Store,
    wanted: jobs.JobFilter | None = None,
    *,
    after: str | None = None,
    limit: int = 100,
    newest: bool = True,
) -> list[str]:
    found = store.run(
        lambda session: jobs.list_jobs(session, wanted, after=after, limit=limit, newest_first=newest), write=False
    )
    return [job.id for job in found]


def test_jobs_come_newest_first_even_with_ids_made_from_keys(store: Store) -> None:
    ids = [accept(store, jobs.NewJob(f"s3://b/{number}", key=f"k{number}"))[0] for number in range(6)]
    assert ids != sorted(ids)
    by_time = sorted(ids, key=lambda job_id: (info(store, job_id).created_at, job_id))
    assert listed(store) == by_time[::-1]
    assert listed(store, newest=False) == by_time


def test_pages_are_stable_while_jobs_come_in(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(7)))
    first = listed(store, limit=3)
    accept(store, "s3://b/late")
    second = listed(store, after=first[-1], limit=3)
    third = listed(store, after=second[-1], limit=3)
    assert first + second + third == ids[::-1]
    with pytest.raises(StoreError, match="no job"):
        listed(store, after=uuid7())


def test_each_filter_finds_its_own(store: Store) -> None:
    ids = accept(
        store,
        jobs.NewJob("s3://b/a", tenant="acme"),
        jobs.NewJob("s3://b/b", priority=9),
        jobs.NewJob("s3://b/c"),
    )
    claim(store, ids[2:])
    assert listed(store, jobs.JobFilter(tenant="acme")) == ids[:1]
    assert listed(store, jobs.JobFilter(queue="code_worker.live")) == ids[1:2]
    assert listed(store, jobs.JobFilter(state=JobState.RUNNING)) == ids[2:]
    assert listed(store, jobs.JobFilter(uri="s3://b/b")) == ids[1:2]
    assert listed(store, jobs.JobFilter(tenant="acme", state=JobState.RUNNING)) == []


def test_unknown_jobs_are_none(store: Store) -> None:
    for unknown in ("", "no id", uuid7()):
        assert store.run(lambda session, unknown=unknown: jobs.get(session, unknown)) is None


def test_every_state_is_counted(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(5)))
    claim(store, ids[:4])
    write(store, judged(ids[0]), rejected(ids[1]), rejected(ids[2], RejectReason.QUARANTINED))
    unfinished = {JobState.ACCEPTED: 1, JobState.RUNNING: 1}
    assert store.run(jobs.counts) == {**unfinished, JobState.DONE: 2, JobState.QUARANTINED: 1}
    assert store.run(lambda session: jobs.counts(session, finished=False)) == {
        **unfinished,
        JobState.DONE: 0,
        JobState.QUARANTINED: 0,
    }


def test_the_oldest_unfinished_job_has_an_age(store: Store) -> None:
    assert store.run(jobs.oldest_unfinished_s) is None
    ids = accept(store, "s3://b/a")
    claim(store, ids)
    age_s = store.run(jobs.oldest_unfinished_s)
    assert age_s is not None
    assert 0 <= age_s < 60
    write(store, judged(ids[0]))
    assert store.run(jobs.oldest_unfinished_s) is None


def test_the_age_of_a_job_that_is_judged_again_counts_from_the_retry(store: Store) -> None:
    old, new = accept(store, "s3://b/a")[0], accept(store, "s3://b/b")[0]
    claim(store, [old, new])
    write(store, judged(old), judged(new))
    long_ago = datetime.now(UTC) - timedelta(days=30)
    store.run(lambda session: session.execute(update(JOBS).values(created_at=long_ago)) and None)
    assert store.run(lambda session: jobs.retry(session, [old])) == [old]
    again = store.run(lambda session: jobs.get(session, old))
    assert again is not None
    assert again.retried_at is not None
    assert again.retried_at - again.created_at > timedelta(days=29)
    age_s = store.run(jobs.oldest_unfinished_s)
    assert age_s is not None
    assert 0 <= age_s < 600
    (waiting,) = accept(store, "s3://b/c")
    earlier = again.retried_at - timedelta(hours=1)
    store.run(
        lambda session: session.execute(update(JOBS).where(JOBS.c.id == waiting).values(created_at=earlier)) and None
    )
    age_s = store.run(jobs.oldest_unfinished_s)
    assert age_s is not None
    assert 3600 <= age_s < 4200


def test_jobs_that_were_retried_just_now_hide_none_that_has_waited_longer(store: Store) -> None:
    accept(store, *(f"s3://b/{number}" for number in range(10_001)))
    waiting, running = accept(store, "s3://b/w"), accept(store, "s3://b/r")
    claim(store, running)
    now, table = datetime.now(UTC), JOBS.update()

    def aged(session: Session, ids: list[str], days: float, retried_days: float | None) -> None:
        retried_at = None if retried_days is None else now - timedelta(days=retried_days)
        values = {"created_at": now - timedelta(days=days), "retried_at": retried_at}
        session.execute(table.where(JOBS.c.id.in_(ids)).values(values))

    def oldest_days() -> float:
        return (store.run(jobs.oldest_unfinished_s) or 0.0) / 86_400

    store.run(lambda session: session.execute(table.values(created_at=now - timedelta(days=30), retried_at=now)))
    store.run(lambda session: aged(session, running, 1, None))
    store.run(lambda session: aged(session, waiting, 2, None))
    assert 2 <= oldest_days() < 2.1, "one that was never judged"
    store.run(lambda session: aged(session, waiting, 29, 3))
    assert 3 <= oldest_days() < 3.1, "one that was retried before the others"


def test_only_finished_jobs_are_retried_and_they_start_afresh(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(4)))
    claim(store, ids[:3], lease_s=-1)
    claim(store, ids[:2])
    write(store, judged(ids[0]), rejected(ids[1], RejectReason.QUARANTINED))
    assert store.run(lambda session: jobs.retry(session, [*ids[::-1], "unknown"])) == [ids[1], ids[0]]
    assert [state(store, job_id) for job_id in ids] == [
        JobState.ACCEPTED,
        JobState.ACCEPTED,
        JobState.RUNNING,
        JobState.ACCEPTED,
    ]
    again = info(store, ids[1])
    assert (again.revision, again.attempts, again.faults, again.owner) == (1, 0, 0, None)
    assert (again.published_at, again.finished_at, again.last_fault) == (None, None, None)
    assert info(store, ids[3]).revision == 0
