"""Claims: one holder at a time, leases that lapse, attempts that count dead workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from code_worker.store import jobs
from code_worker.store.engine import Store
from code_worker.types import JobState, RejectReason
from tests.store.acts import accept, claim, due, info, judged, publish, state, write


def put_back(
    store: Store,
    job_id: str,
    *,
    delay_s: float = 0.0,
    blame: bool = True,
    owner: str | None = None,
    detail: str = "503",
) -> None:
    fault = jobs.Fault(job_id, RejectReason.FETCH_FAILED, detail, delay_s, blame)
    store.run(lambda session: jobs.put_back(session, [fault], owner=owner))


def test_racing_workers_get_each_job_once(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(300)))

    def race(worker: int) -> list[str]:
        got: list[str] = []
        for start in range(0, 300, 20):
            got += [job.id for job in claim(store, ids[start : start + 30], owner=f"w{worker}")]
        return got

    with ThreadPoolExecutor(6) as pool:
        taken = [job_id for got in pool.map(race, range(6)) for job_id in got]
    assert sorted(taken) == sorted(ids)
    assert {info(store, job_id).attempts for job_id in ids[:20]} == {1}


def test_a_claimed_job_is_not_claimed_again_until_its_lease_lapses(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    claim(store, ids, owner="first", lease_s=600)
    assert claim(store, ids, owner="second") == []
    store.run(lambda session: jobs.renew(session, owner="first", lease_s=-1))
    (again,) = claim(store, ids, owner="second")
    assert again.attempts == 2
    assert info(store, ids[0]).owner == "second"


def test_unknown_and_senseless_ids_are_passed_over(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    odd = ["", "not an id", "00000000-0000-7000-8000-000000000000", "' OR 1=1 --", job_id.upper(), job_id]
    assert [job.id for job in claim(store, odd)] == [job_id]
    assert claim(store, []) == []


def test_a_finished_job_is_not_claimed(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    claim(store, ids, lease_s=-1)
    write(store, judged(ids[0]))
    assert claim(store, ids) == []


def test_used_up_attempts_end_in_quarantine_and_not_in_a_claim(store: Store) -> None:
    ids = accept(store, "s3://b/killer", "s3://b/good")
    for _ in range(3):
        assert claim(store, ids[:1], lease_s=-1) != []
    assert claim(store, ids[:1]) == []
    found = store.run(lambda session: jobs.exhausted(session, max_attempts=3, limit=10))
    assert [(job.id, job.attempts, job.uri) for job in found] == [(ids[0], 3, "s3://b/killer")]


def test_a_job_under_its_last_lease_is_not_exhausted(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    claim(store, ids, max_attempts=1, lease_s=600)
    assert store.run(lambda session: jobs.exhausted(session, max_attempts=1, limit=10)) == []


def test_attempts_tell_fresh_jobs_from_suspects(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}" for number in range(3)))
    claim(store, ids[:1], lease_s=-1)
    claim(store, ids[2:])
    write(store, judged(ids[2]))
    assert store.run(lambda session: jobs.attempts_of(session, [*ids, "unknown"])) == {ids[0]: 1, ids[1]: 0}


def test_renewing_extends_only_the_owners_leases(store: Store) -> None:
    ids = accept(store, "s3://b/a", "s3://b/b", "s3://b/c")
    claim(store, ids[:2], owner="me", lease_s=-1)
    claim(store, ids[2:], owner="other", lease_s=-1)
    assert store.run(lambda session: jobs.renew(session, owner="me", lease_s=600, ids=ids[1:])) == 1
    assert [job.id for job in claim(store, ids, owner="third")] == [ids[0], ids[2]]
    assert store.run(lambda session: jobs.renew(session, owner="me", lease_s=600)) == 1


def test_a_fault_puts_the_job_back_and_gives_the_attempt_back(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    publish(store, ids)
    claim(store, ids)
    put_back(store, ids[0], delay_s=3600, detail="no\0pe" * 1000)
    seen = info(store, ids[0])
    assert (seen.state, seen.attempts, seen.faults, seen.owner) == (JobState.ACCEPTED, 0, 1, None)
    assert seen.published_at is None
    assert seen.last_fault is not None
    assert seen.last_fault.startswith("fetch_failed: no\ufffdpe")
    assert len(seen.last_fault) <= 1000
    assert claim(store, ids) == []
    assert due(store) == []


def test_a_job_that_was_put_back_is_due_and_free_after_its_delay(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    claim(store, ids)
    put_back(store, ids[0], delay_s=-1, blame=False)
    assert [job.id for job in due(store)] == ids
    (again,) = claim(store, ids)
    assert (again.attempts, again.faults) == (1, 0)


def test_a_slow_worker_does_not_put_back_what_another_has_claimed(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    claim(store, ids, owner="slow", lease_s=-1)
    claim(store, ids, owner="quick")
    put_back(store, ids[0], owner="slow")
    assert (info(store, ids[0]).owner, info(store, ids[0]).attempts) == ("quick", 2)
    put_back(store, ids[0], owner="quick")
    assert state(store, ids[0]) is JobState.ACCEPTED


def test_a_finished_job_is_not_put_back(store: Store) -> None:
    ids = accept(store, "s3://b/a")
    claim(store, ids)
    write(store, judged(ids[0]))
    put_back(store, ids[0])
    assert state(store, ids[0]) is JobState.DONE


def test_a_dead_owners_jobs_are_due_at_once_and_keep_their_attempts(store: Store) -> None:
    ids = accept(store, "s3://b/a", "s3://b/b")
    publish(store, ids)
    claim(store, ids[:1], owner="dead")
    claim(store, ids[1:], owner="alive")
    assert store.run(lambda session: jobs.release_owner(session, "dead")) == 1
    assert [(job.id, job.attempts) for job in due(store, normal=600)] == [(ids[0], 1)]
    assert [job.id for job in claim(store, ids)] == ids[:1]
