"""Judging history again in the ledger: pages of it, and new verdicts in the place of old ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from code_worker.store import jobs, verdicts
from code_worker.store.engine import Session, Store
from code_worker.store.ids import uuid7
from code_worker.store.verdicts import Page, RescoreFilter
from code_worker.types import Job, JobState, Label, RejectReason, Verdict
from tests.store.acts import accept, claim, info, judged, rejected, state, write

EVER = RescoreFilter(datetime(2020, 1, 1, tzinfo=UTC))


def decided(store: Store, *scores: float, **fields: object) -> list[str]:
    """Accepts and judges an image per score."""
    ids = accept(store, *(jobs.NewJob(f"s3://b/{score}", **fields) for score in scores))  # type: ignore[arg-type]
    claim(store, ids)
    write(
        store,
        *(judged(job, score=score, tenant=fields.get("tenant")) for job, score in zip(ids, scores, strict=True)),
    )
    return ids


def page(store: Store, wanted: RescoreFilter = EVER, limit: int = 100) -> Page:
    return store.run(lambda session: verdicts.page(session, wanted, limit=limit), write=False)


def live(store: Store, job_id: str) -> Verdict:
    found = store.run(lambda session: verdicts.live(session, job_id), write=False)
    assert found is not None
    return found


def again(pair: tuple[Job, Verdict], score: float = 0.25) -> Verdict:
    job, old = pair
    return judged(job.id, score=score, revision=job.revision, supersedes=old.id, id=uuid7())


def replace_live(store: Store, *new: Verdict) -> set[str]:
    return set(store.run(lambda session: verdicts.replace_live(session, new)))


def test_a_page_has_finished_judged_jobs_with_what_choosing_a_head_needs(store: Store) -> None:
    (first,) = decided(store, 0.9, head="svm", priority=7, key="post-1")
    others = accept(store, "s3://b/waiting", "s3://b/bad", "s3://b/again")
    claim(store, others[1:])
    write(store, rejected(others[1]), judged(others[2]))
    store.run(lambda session: jobs.retry(session, [others[2]]))
    found = page(store)
    ((job, old),) = found.judged
    assert old == live(store, first)
    assert (job.id, job.head, job.priority, job.key, job.revision) == (first, "svm", 7, "post-1", 1)
    assert job.metadata == {"post": 7}
    assert found.last is None


def test_pages_show_every_job_once_and_go_on_behind_what_does_not_match(store: Store) -> None:
    ids = decided(store, 0.1, 0.9, 0.2, 0.8, 0.3)
    wanted, last, seen, pages = replace(EVER, label=Label.FAKE), None, [], 0
    while True:
        found = store.run(
            lambda session, after=last: verdicts.page(session, wanted, after=after, limit=2),  # type: ignore[misc]
            write=False,
        )
        seen += [job.id for job, _ in found.judged]
        pages += 1
        if (last := found.last) is None:
            break
    assert sorted(seen) == sorted([ids[1], ids[3]])
    assert pages == 3


def test_jobs_are_chosen_by_when_they_were_accepted_and_whose_they_are(store: Store) -> None:
    (acme,) = decided(store, 0.9, tenant="acme")
    (other,) = decided(store, 0.8)
    at = info(store, acme).created_at
    later = at + timedelta(hours=1)

    def found(**wanted: object) -> set[str]:
        return {job.id for job, _ in page(store, replace(EVER, **wanted)).judged}  # type: ignore[arg-type]

    assert found() == found(since=at, until=later) == {acme, other}
    assert found(since=later) == found(until=at) == set()
    assert found(tenant="acme") == {acme}


def test_a_new_verdict_takes_the_place_of_the_old_one_which_stays(store: Store) -> None:
    (job_id,) = decided(store, 0.9)
    (pair,) = page(store).judged
    new = again(pair)
    assert replace_live(store, new) == {job_id}
    now = live(store, job_id)
    assert (now.id, now.revision, now.label, now.supersedes) == (new.id, 1, Label.REAL, pair[1].id)
    assert store.run(lambda session: verdicts.get(session, str(pair[1].id))) == pair[1]
    assert (state(store, job_id), info(store, job_id).revision) == (JobState.DONE, 1)
    ((job, _),) = page(store).judged
    assert job.revision == 2, "and it can be given again"


def test_a_transaction_that_runs_twice_writes_once_and_says_so(store: Store) -> None:
    ids = decided(store, 0.9, 0.8)
    new = [again(pair) for pair in page(store).judged]
    assert replace_live(store, *new) == set(ids)
    assert replace_live(store, *new) == set(ids)
    assert [live(store, job_id).revision for job_id in ids] == [1, 1]


def test_a_job_that_moved_on_is_left_alone(store: Store) -> None:
    retried, rescored, still = decided(store, 0.9, 0.8, 0.7)
    pairs = {job.id: (job, old) for job, old in page(store).judged}
    store.run(lambda session: jobs.retry(session, [retried]))
    assert replace_live(store, again(pairs[rescored], 0.1)) == {rescored}
    assert replace_live(store, *(again(pair) for pair in pairs.values())) == {still}
    assert live(store, retried).revision == 0
    assert (state(store, retried), info(store, retried).revision) == (JobState.ACCEPTED, 1)
    assert live(store, rescored).score == 0.1


def test_a_retry_after_judging_again_gives_the_verdict_after_it(store: Store) -> None:
    (job_id,) = decided(store, 0.9)
    replace_live(store, again(page(store).judged[0]))
    store.run(lambda session: jobs.retry(session, [job_id]))
    (job,) = claim(store, [job_id])
    assert write(store, judged(job_id, score=0.6, revision=job.revision)) == [job_id]
    now = live(store, job_id)
    assert (now.revision, now.score, state(store, job_id)) == (2, 0.6, JobState.DONE)


def test_retries_and_rescores_at_the_same_moment_leave_each_job_one_way(store: Store) -> None:
    ids = decided(store, *(number / 100 for number in range(60)))
    new = [again(pair) for pair in page(store).judged]

    def retry(session: Session) -> list[str]:
        return jobs.retry(session, ids[::-1])

    with ThreadPoolExecutor(3) as pool:
        retried = pool.submit(store.run, retry)
        rescored = [pool.submit(replace_live, store, *some) for some in (new[:40], new[20:])]
        assert sorted(retried.result()) == sorted(ids)
        written = set().union(*(one.result() for one in rescored))
    for job_id in ids:
        job = info(store, job_id)
        assert job.state is JobState.ACCEPTED, "a retry is never lost"
        assert job.revision == (2 if job_id in written else 1)
        assert live(store, job_id).revision == (1 if job_id in written else 0)


def test_quarantined_jobs_are_no_history_to_judge(store: Store) -> None:
    (job_id,) = accept(store, "s3://b/a")
    claim(store, [job_id])
    write(store, rejected(job_id, RejectReason.QUARANTINED))
    assert page(store).judged == []
    assert replace_live(store, judged(job_id, revision=1, id=uuid7())) == set()
