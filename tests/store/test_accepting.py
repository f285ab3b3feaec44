"""Accepting jobs: once each, whatever is repeated."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from typing import Any
from uuid import UUID

import pytest

from code_worker.errors import IdConflictError
from code_worker.store import jobs
from code_worker.store.engine import Store
from code_worker.types import JobState
from tests.store.acts import accept, claim, info


def test_a_job_keeps_every_field(store: Store) -> None:
    new = jobs.NewJob(
        "s3://b/ü €.jpg", "knn", "acme", "avatar", 9, {"post": [1, {"deep": "ü"}], "none": None}, "post-1"
    )
    (job_id,) = accept(store, new)
    (claimed,) = claim(store, [job_id])
    assert (claimed.uri, claimed.head, claimed.tenant, claimed.content_type, claimed.priority) == (
        *("s3://b/ü €.jpg", "knn", "acme", "avatar"),
        9,
    )
    assert claimed.metadata == {"post": [1, {"deep": "ü"}], "none": None}
    assert (claimed.key, claimed.attempts, claimed.faults, claimed.revision) == ("post-1", 1, 0, 0)
    seen = info(store, job_id)
    assert seen.queue == "code_worker.live"
    assert seen.created_at.tzinfo is UTC


def test_ids_come_in_the_order_of_the_jobs_and_of_time(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(50)))
    assert ids == sorted(ids)
    assert [job.uri for job in claim(store, ids)] == [f"s3://b/{number}" for number in range(50)]
    assert {UUID(job_id).version for job_id in ids} == {7}


def test_the_same_key_twice_is_one_job(store: Store) -> None:
    first = accept(store, jobs.NewJob("s3://b/a", key="k", metadata={"a": 1, "b": 2}))
    again = accept(store, jobs.NewJob("s3://b/a", key="k", metadata={"b": 2, "a": 1}))
    assert first == again
    assert store.run(jobs.counts)[JobState.ACCEPTED] == 1


def test_the_same_key_twice_in_one_call_is_one_job(store: Store) -> None:
    new = jobs.NewJob("s3://b/a", key="k")
    other = jobs.NewJob("s3://b/b")
    ids = accept(store, new, other, jobs.NewJob("s3://b/a", key="k"))
    assert ids == [new.id, other.id, new.id]
    assert store.run(jobs.counts)[JobState.ACCEPTED] == 2


def test_one_key_for_two_jobs_is_refused_and_nothing_is_accepted(store: Store) -> None:
    accept(store, jobs.NewJob("s3://b/a", key="post-1"))
    with pytest.raises(IdConflictError, match="'post-1'"):
        accept(store, "s3://b/x", jobs.NewJob("s3://b/other", key="post-1"))
    with pytest.raises(IdConflictError, match="'post-2'"):
        accept(store, jobs.NewJob("s3://b/a", key="post-2"), jobs.NewJob("s3://b/a", key="post-2", priority=9))
    assert store.run(jobs.counts)[JobState.ACCEPTED] == 1


def test_tenants_do_not_share_keys(store: Store) -> None:
    ids = accept(store, *(jobs.NewJob("s3://b/a", tenant=tenant, key="k") for tenant in (None, "acme", "other")))
    assert len(set(ids)) == 3


def test_accepting_again_after_a_lost_answer_adds_nothing(store: Store) -> None:
    new = [jobs.NewJob(f"s3://b/{number}") for number in range(3)]
    assert accept(store, *new) == accept(store, *new)
    assert store.run(jobs.counts)[JobState.ACCEPTED] == 3


def test_a_keyed_job_that_is_done_stays_done(store: Store) -> None:
    (job_id,) = accept(store, jobs.NewJob("s3://b/a", key="k"))
    claim(store, [job_id])
    accept(store, jobs.NewJob("s3://b/a", key="k"))
    assert info(store, job_id).state is JobState.RUNNING


def test_producers_with_the_same_keys_at_once_make_each_job_once(store: Store) -> None:
    def produce(offset: int) -> list[str]:
        numbers = [(offset + number) % 200 for number in range(200)]
        return accept(store, *(jobs.NewJob(f"s3://b/{number}", key=f"k{number}") for number in numbers))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(produce, (0, 50, 100, 150)))
    assert len({job_id for ids in results for job_id in ids}) == 200
    assert store.run(jobs.counts)[JobState.ACCEPTED] == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"uri": ""},
        {"uri": "s3://b/\0"},
        {"uri": "s3://b/\ud800"},
        {"uri": "s3://b/" + "a" * 5000},
        {"tenant": "a\0"},
        {"tenant": "a" * 201},
        {"key": ""},
        {"priority": 10},
        {"metadata": {"a": float("nan")}},
        {"metadata": {"a": {"b": "\0"}}},
        {"metadata": {"a": "\udfff"}},
        {"metadata": {"a": object()}},
        {"metadata": {"a": 1, 2: "b"}},
    ],
    ids=lambda fields: repr(fields)[1:34],
)
def test_what_a_database_cannot_store_is_refused_before_it_is_asked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="job not accepted"):
        jobs.NewJob(**{"uri": "s3://b/a", **fields})


def test_a_backslash_before_u0000_is_no_nul(store: Store) -> None:
    (job_id,) = accept(store, jobs.NewJob("s3://b/a", metadata={"a": "\\u0000"}))
    assert info(store, job_id).metadata == {"a": "\\u0000"}


def test_many_jobs_go_in_at_once(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(5000)))
    assert len(set(ids)) == 5000
    assert store.run(jobs.counts)[JobState.ACCEPTED] == 5000


def test_accepting_nothing_is_nothing(store: Store) -> None:
    assert accept(store) == []
