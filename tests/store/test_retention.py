"""What is too old goes, in bounded batches and with an entry that says so; all else stays."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from sqlalchemy import func, select, text

from code_worker.store import audit, embeddings, jobs, retention, workers
from code_worker.store import verdicts as verdict_store
from code_worker.store.engine import Session, Store
from code_worker.store.ids import uuid7, uuid7_floor
from code_worker.store.learning import challenger_scores, image_groups, kept_images, labels, runs
from code_worker.store.learning import runs as schedule
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.labels import NewLabel
from code_worker.store.models import ImageGroupRow, ImageOriginRow, KeptImageRow, db_now_plus
from code_worker.store.sql import table_of
from code_worker.types import ShadowScore
from tests.store.acts import HASH, accept, claim, judged, write

NOW_OLD = 0.05 / 86_400
"""Days after which the tests' own rows are old, having waited for `age`; whatever comes after it may be too."""
OTHER = "b" * 64


def age() -> float:
    """Lets what is there grow old; a moment after all of it and before what comes next (Unix seconds)."""
    time.sleep(0.12)
    return time.time() - 0.06


def days_since(moment: float) -> float:
    """To be asked in the transaction that needs it, so that a slow test makes nothing older."""
    return (time.time() - moment) / 86_400


def prune(store: Store, kind: str, days: float = NOW_OLD, limit: int = 100, since: float | None = None) -> int:
    """Deletes what is older than `days`, or than the moment `since`."""
    prune_one = retention.PRUNERS[kind]
    return store.run(lambda session: prune_one(session, days if since is None else days_since(since), limit))


def done(store: Store, uri: str = "s3://b/a.jpg") -> str:
    (job_id,) = accept(store, uri)
    claim(store, [job_id])
    write(store, judged(job_id))
    return job_id


def known(store: Store, job_id: str) -> bool:
    return store.run(lambda session: jobs.get(session, job_id), write=False) is not None


def live(store: Store, job_id: str) -> str | None:
    found = store.run(lambda session: verdict_store.live(session, job_id), write=False)
    return None if found is None else found.id


def test_the_least_id_of_a_moment_parts_those_before_from_those_after() -> None:
    before = uuid7()
    time.sleep(0.002)
    floor = uuid7_floor(datetime.now(UTC))
    time.sleep(0.002)
    assert before < floor < uuid7()


def test_finished_jobs_go_with_verdicts_and_shadow_scores_and_unfinished_ones_never(store: Store) -> None:
    old = [done(store) for _ in range(3)]
    (waiting,) = accept(store, "s3://b/waits.jpg")
    score = ShadowScore(
        job_id=old[0],
        revision=0,
        sha256=HASH,
        release="r-2",
        head="linear",
        score=0.1,
        label="real",
        champion="r-1",
        champion_head="linear",
        champion_score=0.9,
        champion_label="fake",
        tenant=None,
        content_type=None,
    )
    store.run(lambda session: challenger_scores.add(session, [score]))
    moment = age()
    fresh = done(store)
    assert [prune(store, "jobs", limit=2, since=moment) for _ in range(3)] == [2, 1, 0]
    assert [known(store, job_id) for job_id in (*old, waiting, fresh)] == [False] * 3 + [True] * 2
    assert live(store, old[0]) is None
    assert live(store, fresh) is not None
    assert store.run(challenger_scores.last, write=False) is None
    first = store.run(lambda session: audit.last(session, action="retention.remove"), write=False)
    assert first is not None
    assert (first.actor, first.subject, '"count":1' in first.details) == ("retention", "jobs", True)


def test_dead_letters_and_embeddings_may_be_partitioned(postgres_store: Store) -> None:
    keys = {"dead_letters": "range (id)", "embeddings": "list (encoder_sha256)"}
    with postgres_store.engine.begin() as connection:
        for table, key in keys.items():
            connection.execute(text(f"alter table {table} rename to old_{table}"))
            connection.execute(text(f"create table {table} (like old_{table} including all) partition by {key}"))
            connection.execute(text(f"create table all_{table} partition of {table} default"))

    def keep() -> None:
        postgres_store.run(lambda session: workers.dead_letter(session, task="t", body="b", error="e"))
        postgres_store.run(lambda session: embeddings.keep(session, "e" * 64, {HASH: bytes(768)}))

    keep()
    assert postgres_store.look(lambda session: embeddings.known(session, "e" * 64, [HASH])) == {HASH: bytes(768)}
    age()
    assert [prune(postgres_store, kind) for kind in keys for _ in range(2)] == [1, 0, 1, 0]
    keep()
    age()
    with postgres_store.engine.begin() as connection:
        for table in keys:
            connection.execute(text(f"drop table all_{table}"))
    assert [prune(postgres_store, kind) for kind in keys] == [0, 0]


def test_a_job_that_was_judged_again_lately_stays_whole(store: Store) -> None:
    job_id = done(store)
    moment = age()
    judge_again(store, job_id)
    assert prune(store, "jobs", since=moment) == 0
    assert prune(store, "superseded", since=moment) == 1, "its first verdict was replaced"
    found = store.run(lambda session: verdict_store.live(session, job_id), write=False)
    assert found is not None
    assert found.revision == 1


def test_a_job_is_held_while_whose_image_it_was_is_noted(postgres_store: Store) -> None:
    """Else it is erased at that moment, and what is noted of it comes after."""
    job_id = done(postgres_store)
    judge_again(postgres_store, job_id)

    def erased_meanwhile(session: Session) -> bool:
        assert retention.superseded(session, NOW_OLD, 100) == 1
        with postgres_store.engine.connect() as other:
            free = other.exec_driver_sql("SELECT id FROM jobs FOR UPDATE SKIP LOCKED").all()
        return bool(free)

    age()
    assert not postgres_store.run(erased_meanwhile)


def judge_again(store: Store, job_id: str) -> None:
    """The job is judged once more."""
    store.run(lambda session: jobs.retry(session, [job_id]))
    claim(store, [job_id])
    write(store, judged(job_id, revision=1))


@pytest.mark.parametrize("kept_for_days", [0.1, 60])
def test_a_copy_that_nobody_spoke_of_goes_after_its_job_with_whose_it_was(store: Store, kept_for_days: float) -> None:
    """Its labeller died; while a verdict named it, it was a judged image's."""
    kept, origins = table_of(KeptImageRow), table_of(ImageOriginRow)
    done(store)
    store.run(lambda session: kept_images.note_kept(session, [KeptImage(HASH, 1, "png", 1, 1, "s3://b/a.jpg")]))
    noted = kept.update().values(created_at=db_now_plus(-kept_for_days * 86_400))
    store.run(lambda session: session.execute(noted))
    assert forget(store) == 0
    age()
    assert prune(store, "jobs") == 1
    assert store.run(lambda session: session.scalar(select(func.count()).select_from(origins))) == 1
    age()
    assert forget(store) == 1
    assert store.run(lambda session: session.scalar(select(func.count()).select_from(origins))) == 0
    assert store.run(lambda session: kept_images.copies_to_drop(session, limit=9)) == [HASH]


def forget(store: Store) -> int:
    return store.run(lambda session: kept_images.forget_unsaid(session, older_s=0.05, limit=9))


def test_nobody_is_held_up_where_no_copy_is_to_be_forgotten(postgres_store: Store) -> None:
    held = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")

    def look(session: Session) -> int | None:
        assert kept_images.forget_unsaid(session, older_s=0.05, limit=9) == 0
        count: int | None = session.scalar(held)
        return count

    assert postgres_store.run(look) == 0


def test_embeddings_go_unless_a_copy_of_the_image_is_kept(store: Store) -> None:
    vector = bytes(768)
    image = KeptImage(OTHER, 1, "png", 1, 1, "s3://b/kept.png")

    def keep(session):  # type: ignore[no-untyped-def]  # SQLAlchemy's session
        for encoder in ("e" * 64, "f" * 64):
            embeddings.keep(session, encoder, {HASH: vector, OTHER: vector})
        kept_images.note_kept(session, [image])

    store.run(keep)
    assert prune(store, "embeddings", days=1) == 0
    age()
    assert [prune(store, "embeddings", limit=1) for _ in range(3)] == [1, 1, 0]
    assert set(store.run(lambda session: embeddings.known(session, "e" * 64, [HASH, OTHER]), write=False)) == {OTHER}


def test_images_go_with_all_that_was_said_of_them_unless_somebody_spoke_since(store: Store) -> None:
    said = [NewLabel(HASH, "fake", "alice", "api"), NewLabel(OTHER, "real", "alice", "api")]
    images = [KeptImage(one, 1, "png", 1, 1, "s3://b/x") for one in (HASH, OTHER)]

    def label(session):  # type: ignore[no-untyped-def]  # SQLAlchemy's session
        kept_images.note_kept(session, images)
        labels.note_imported(session, {"1" * 64: HASH, "2" * 64: OTHER})
        return labels.add(session, said)

    store.run(label)
    store.run(lambda session: image_groups.place(session, {HASH: "a post", OTHER: "another"}))
    moment = age()
    store.run(lambda session: labels.add(session, [NewLabel(OTHER, "fake", "bob", "api")]))
    old = store.run(lambda session: retention.old_images(session, days_since(moment), 10), write=False)
    assert old == [HASH]
    assert store.run(lambda session: retention.forget_labels(session, [HASH, OTHER], days_since(moment))) == 1
    assert {one.sha256 for one in store.run(lambda session: labels.list_labels(session, limit=9))} == {OTHER}
    assert set(store.run(lambda session: kept_images.kept(session, [HASH, OTHER]))) == {OTHER}
    assert store.run(lambda session: session.scalar(select(func.count()).select_from(ImageGroupRow))) == 1
    assert store.run(lambda session: labels.imported(session, ["1" * 64, "2" * 64])) == {"2" * 64: OTHER}


@pytest.mark.parametrize("kind", ["dead_letters", "curves", "slots"])
def test_what_only_the_running_of_the_system_left_goes_by_age(store: Store, kind: str) -> None:
    run_id = uuid7()

    def leave(session):  # type: ignore[no-untyped-def]  # SQLAlchemy's session
        workers.dead_letter(session, task="t", body="b", error="e")
        run = runs.start(session, id=run_id, kind="refit", by="a", owner="a:1", config={}, base_release=None)
        assert run is not None
        runs.add_metrics(session, run.lease, [runs.RunMetrics(1, 1, {"loss": 1.0})])
        for day in (1, 2):
            schedule.take_slot(session, "refit", datetime(2026, 1, day, tzinfo=UTC), run_id=None, outcome="started")

    store.run(leave)
    age()
    assert prune(store, kind, days=1000) == 0
    assert [prune(store, kind), prune(store, kind)] == [1, 0]
    last = store.run(lambda session: schedule.last_slot(session, "refit"), write=False)
    assert last is not None, "by the last slot a missed one is told"
    assert last.slot.day == 2
