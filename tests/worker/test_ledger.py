"""A bucket that is closed as a whole pauses; its images are not rejected one by one, nor left rejected."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import pytest

from code_worker.moderation.judge import Judged
from code_worker.settings import WorkerSettings
from code_worker.store import verdicts, workers
from code_worker.store.engine import Store, open_store
from code_worker.store.models import JobRow, SourcePauseRow, db_now_plus
from code_worker.store.sql import table_of
from code_worker.types import ImageFacts, Job, JobState, Outcome, RejectReason, Verdict
from code_worker.worker.judging.recorder import Recorder
from tests.faults.proxy import TcpProxy
from tests.store.acts import accept, info

LIMIT = 5


def ledger(store: Store, owner: str = "worker", **settings: object) -> Recorder:
    return Recorder(store, WorkerSettings(max_denied=LIMIT, **settings), owner)  # type: ignore[arg-type]


def batch(worker: Recorder, uris: Sequence[str], reason: RejectReason | None) -> list[str]:
    """Jobs that a worker claims and records as rejected so, or as judged; their ids."""
    ids = accept(worker.store, *uris)
    finish(worker, ids, reason)
    return ids


def finish(worker: Recorder, ids: Sequence[str], reason: RejectReason | None) -> None:
    worker.record(Judged([_verdict(job, reason) for job in worker.claim(ids, below=3)]), "e" * 64, lambda: None)


def _verdict(job: Job, reason: RejectReason | None) -> Verdict:
    facts = ImageFacts("a" * 64, 3) if reason in {None, RejectReason.CORRUPT} else None
    return Verdict(
        job.id,
        job.uri,
        Outcome.REJECTED,
        reason=reason or RejectReason.CORRUPT,
        detail="said",
        facts=facts,
        revision=job.revision,
    )


def uris(count: int, bucket: str = "closed") -> list[str]:
    return [f"s3://{bucket}/{number}.jpg" for number in range(count)]


def states(store: Store, ids: Sequence[str]) -> set[JobState]:
    return {info(store, job).state for job in ids}


def look(worker: Recorder) -> None:
    """What a worker does every few seconds."""
    worker.troubled = frozenset(worker.store.run(lambda session: workers.paused_sources(session, lately=True)))


def lapse(store: Store) -> None:
    """The pause is over, and with it the waits of the jobs."""
    table = table_of(SourcePauseRow)
    store.run(lambda session: session.execute(table.update().values(until=db_now_plus(-1))).close())
    waiting = table_of(JobRow)
    store.run(lambda session: session.execute(waiting.update().values(not_before=None)).close())


DENIED = RejectReason.ACCESS_DENIED


def test_a_few_that_are_denied_are_closed_images(sqlite_store: Store) -> None:
    worker = ledger(sqlite_store)
    ids = batch(worker, uris(LIMIT - 1), DENIED)
    assert states(sqlite_store, ids) == {JobState.DONE}
    assert sqlite_store.run(workers.paused_sources) == {}


def test_a_row_of_them_is_a_closed_bucket_and_what_was_rejected_is_judged_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    worker = ledger(store)
    first = batch(worker, uris(LIMIT - 1), DENIED)
    last = batch(worker, uris(3), DENIED)
    assert states(store, [*first, *last]) == {JobState.ACCEPTED}
    assert not any(store.run(lambda session, job=job: verdicts.live(session, job)) for job in last)
    assert {info(store, job).faults for job in [*first, *last]} == {0}, "no image is to blame"
    pause = store.run(workers.paused_sources)["s3://closed"]
    assert "s3:GetObject" in pause.detail
    assert "source_paused" in caplog.text


def test_after_the_pause_one_denial_pauses_again_and_one_image_that_is_read_ends_it(store: Store) -> None:
    worker, other = ledger(store), ledger(store, "other")
    ids = batch(worker, uris(LIMIT), DENIED)
    lapse(store)
    look(other)
    finish(other, ids[:1], DENIED)
    assert states(store, ids) == {JobState.ACCEPTED}
    assert store.run(workers.paused_sources), "paused again by a worker that knows of it from the ledger alone"
    lapse(store)
    look(worker)
    finish(worker, ids[:2], None)
    assert states(store, ids[:2]) == {JobState.DONE}
    assert store.run(lambda session: workers.paused_sources(session, lately=True)) == {}
    look(worker)
    (alone,) = batch(worker, uris(1), DENIED)
    assert states(store, [alone]) == {JobState.DONE}, "the row begins anew"


def test_what_another_worker_rejected_in_the_same_trouble_is_judged_again_too(store: Store) -> None:
    worker, other = ledger(store), ledger(store, "other")
    before = batch(other, uris(LIMIT - 1), DENIED)
    elsewhere = batch(other, uris(1, "closed-2"), DENIED)
    missing = batch(other, uris(1), RejectReason.NOT_FOUND)
    batch(worker, uris(LIMIT), DENIED)
    assert states(store, before) == {JobState.ACCEPTED}
    assert states(store, [*elsewhere, *missing]) == {JobState.DONE}
    # One that did not know of the pause yet.
    (late,) = batch(other, uris(1), DENIED)
    lapse(store)
    look(worker)
    batch(worker, uris(1), None)
    assert states(store, [*before, late]) == {JobState.ACCEPTED}


@pytest.mark.parametrize("readable", [None, RejectReason.TOO_LARGE_BYTES, RejectReason.ARCHIVED])
def test_an_image_that_may_be_read_ends_the_row(sqlite_store: Store, readable: RejectReason | None) -> None:
    worker = ledger(sqlite_store)
    ids = batch(worker, uris(LIMIT - 1), DENIED)
    batch(worker, uris(1), readable)
    ids += batch(worker, uris(LIMIT - 1), DENIED)
    assert states(sqlite_store, ids) == {JobState.DONE}


def test_an_image_that_is_not_there_ends_no_row(sqlite_store: Store) -> None:
    worker = ledger(sqlite_store)
    batch(worker, uris(LIMIT - 1), DENIED)
    batch(worker, uris(1), RejectReason.NOT_FOUND)
    batch(worker, uris(1), DENIED)
    assert sqlite_store.run(workers.paused_sources).keys() == {"s3://closed"}


def test_files_and_other_buckets_have_rows_of_their_own(sqlite_store: Store) -> None:
    worker = ledger(sqlite_store)
    ids = batch(worker, [f"/photos/{number}.jpg" for number in range(2 * LIMIT)], DENIED)
    for bucket in "ab":
        ids += batch(worker, uris(LIMIT - 1, bucket), DENIED)
    assert states(sqlite_store, ids) == {JobState.DONE}


def test_without_a_limit_each_is_rejected_by_itself(sqlite_store: Store) -> None:
    worker = Recorder(sqlite_store, WorkerSettings(max_denied=None), "worker")
    ids = batch(worker, uris(30), DENIED)
    assert states(sqlite_store, ids) == {JobState.DONE}


def test_a_claim_whose_answer_is_lost_is_a_claim(
    lossy_postgres: tuple[TcpProxy, str], postgres_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, url = lossy_postgres
    monkeypatch.setattr("code_worker.store.engine.time.sleep", lambda _: proxy.refuse(refusing=False))
    ids = accept(postgres_store, *uris(4))
    with closing(open_store(url)) as store:
        worker = ledger(store)
        (held,) = worker.claim(ids[:1], below=3)
        proxy.cut_at_answer_to(b"UPDATE jobs", b"COMMIT")
        claimed = worker.claim(ids, below=3, held=lambda: [held.id])
        assert proxy.cut.is_set()
    assert [job.id for job in claimed] == ids[1:]
    assert {job.attempts for job in claimed} == {1}
    assert states(postgres_store, ids) == {JobState.RUNNING}
