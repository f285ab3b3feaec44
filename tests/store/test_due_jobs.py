"""Which jobs are published for again, and which are left to wait."""

from __future__ import annotations

from code_worker.store import jobs
from code_worker.store.engine import Session, Store
from code_worker.store.models import JobRow, time_plus
from code_worker.store.sql import table_of
from code_worker.types import JobState
from tests.store.acts import accept, claim, due, info, judged, publish, state, write

NORMAL = "code_worker.normal"


def age(store: Store, ids: list[str], *, seconds: float) -> None:
    """Makes jobs look as if everything had happened earlier."""
    table = table_of(JobRow)
    names = ("created_at", "due_at", "published_at", "claimed_at")
    earlier = {name: time_plus(table.c[name], -seconds) for name in names}

    def work(session: Session) -> None:
        session.execute(table.update().where(table.c.id.in_(ids)).values(earlier))

    store.run(work)


def with_lost_messages(store: Store, *queues: str, older_than_s: float = 60.0, limit: int = 100) -> list[str]:
    found = store.run(
        lambda session: jobs.with_lost_messages(session, queues, older_than_s=older_than_s, limit=limit)
    )
    return [job.id for job in found]


def test_an_accepted_job_is_left_to_its_producer_for_a_while(store: Store) -> None:
    ids = accept(store, "s3://b/a", jobs.NewJob("s3://b/b", priority=9))
    age(store, ids, seconds=-600)  # a slow test must not look like a slow producer
    assert due(store) == []
    age(store, ids, seconds=620)
    assert {(job.id, job.queue, job.attempts) for job in due(store)} == {
        (ids[0], NORMAL, 0),
        (ids[1], "code_worker.live", 0),
    }


def test_a_due_job_stays_due_until_it_is_published(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    age(store, ids, seconds=20)
    assert [job.id for job in due(store)] == ids
    assert [job.id for job in due(store)] == ids
    publish(store, ids)
    assert due(store) == []


def test_a_lapsed_lease_is_rung_for_with_its_attempts(store: Store) -> None:
    ids = accept(store, "s3://b/a", "s3://b/b")
    publish(store, ids)
    claim(store, ids[:1], lease_s=-1)
    claim(store, ids[1:], lease_s=60)
    assert [(job.id, job.attempts) for job in due(store, normal=600)] == [(ids[0], 1)]
    assert state(store, ids[0]) is JobState.ACCEPTED
    assert info(store, ids[0]).owner is None


def test_a_published_job_is_rung_for_after_the_longer_of_both_waits(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    publish(store, ids, wait_s=60)
    age(store, ids, seconds=100)
    assert due(store, normal=300) == []
    age(store, ids, seconds=150)
    assert due(store, normal=300) == []
    age(store, ids, seconds=100)
    assert [job.id for job in due(store, normal=300)] == ids


def test_a_long_queue_does_not_hide_what_is_really_due(store: Store) -> None:
    waiting = accept(store, *(f"s3://b/{number}" for number in range(50)))
    publish(store, waiting, wait_s=1)
    age(store, waiting, seconds=100)
    lapsed = accept(store, jobs.NewJob("s3://b/live", priority=8))
    claim(store, lapsed, lease_s=-1)
    assert [job.id for job in due(store, limit=5, normal=600, live=60)] == lapsed


def test_the_longest_due_come_first_and_no_more_than_asked(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(4)))
    for position, job_id in enumerate(reversed(ids)):
        age(store, [job_id], seconds=100 - position)
    assert [job.id for job in due(store, limit=3)] == ids[:0:-1]


def test_publishing_leaves_claimed_and_finished_jobs_alone(store: Store) -> None:
    ids = accept(store, "s3://b/a", "s3://b/b")
    claim(store, ids)
    write(store, judged(ids[1]))
    before = [info(store, job_id) for job_id in ids]
    publish(store, [*ids, "unknown"], wait_s=9999)
    assert [info(store, job_id) for job_id in ids] == before


def test_jobs_of_an_emptied_queue_are_rung_for_at_once(store: Store) -> None:
    ids = accept(store, "s3://b/a", "s3://b/b", jobs.NewJob("s3://b/live", priority=9), "s3://b/unpublished")
    publish(store, ids[:3], wait_s=600)
    assert with_lost_messages(store, NORMAL) == []
    age(store, ids, seconds=100)
    claim(store, ids[1:2])
    assert with_lost_messages(store, NORMAL) == ids[:1]
    assert len(with_lost_messages(store, NORMAL, "code_worker.live", limit=1)) == 1
    assert sorted(with_lost_messages(store, NORMAL, "code_worker.live")) == sorted([ids[0], ids[2]])
    publish(store, ids[:1])
    assert with_lost_messages(store, NORMAL) == []


def test_what_one_sweeper_looks_at_a_second_passes_over(postgres_store: Store) -> None:
    ids = accept(postgres_store, "s3://b/a", "s3://b/b")
    age(postgres_store, ids, seconds=20)

    def first(session: Session) -> tuple[list[str], list[str]]:
        mine = [job.id for job in jobs.due(session, limit=1, min_wait_s={NORMAL: 60.0})]
        return mine, [job.id for job in due(postgres_store)]

    assert postgres_store.run(first) == (ids[:1], ids[1:])


def test_the_wait_is_that_of_the_slowest_hundredth(store: Store) -> None:
    assert store.run(lambda session: jobs.queue_wait_s(session, NORMAL)) is None
    ids = accept(store, *(f"s3://b/{number}" for number in range(20)))
    publish(store, ids)
    age(store, ids, seconds=40)
    claim(store, ids)
    wait_s = store.run(lambda session: jobs.queue_wait_s(session, NORMAL))
    assert wait_s is not None
    assert 40 <= wait_s < 100
    assert store.run(lambda session: jobs.queue_wait_s(session, "code_worker.live")) is None


def test_waits_of_long_ago_do_not_count(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    publish(store, ids)
    claim(store, ids)
    age(store, ids, seconds=3600)
    assert store.run(lambda session: jobs.queue_wait_s(session, NORMAL)) is None
