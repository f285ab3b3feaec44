"""What was begun with an image before it was erased and ends afterwards: rescoring, a training run, its snapshot."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import delete, update

from code_worker.data.datasets.examples import REAL, Example
from code_worker.data.erasure.erase import Eraser
from code_worker.data.kept_copies import LocalKept, open_kept
from code_worker.data.labelling import Labeller
from code_worker.errors import DatasetError, RunLostError, StoreError
from code_worker.moderation.judge import Judged
from code_worker.moderation.rescore import Rejudged
from code_worker.settings import Settings
from code_worker.store import jobs
from code_worker.store.engine import Session, Store
from code_worker.store.erasure import receipts
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import uuid7
from code_worker.store.learning import labels, runs
from code_worker.store.models import JobRow, LeaseRow
from code_worker.store.sql import table_of
from code_worker.training import snapshot as snapshots
from code_worker.training.run_context import RunLease
from code_worker.training.snapshot_embeddings import SnapshotEncoder
from code_worker.types import ImageFacts
from code_worker.worker.intake import accept_items
from code_worker.worker.judging.recorder import Recorder
from code_worker.worker.judging.rescore_run import _write as write_rescored
from code_worker.worker.retention import Retention
from tests.data.label_acts import Place, sha256_of
from tests.moderation.doubles import MeanEmbedder, png
from tests.store.acts import accept, claim, judged, state, write
from tests.training.learning import label, learning_settings, pictures
from tests.worker.harness import wait_until

DATA = png(7, 32)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return learning_settings(tmp_path / "data")


def test_an_eraser_that_slept_erases_nothing_after_others_took_over_and_finished(
    sqlite_store: Store, settings: Settings
) -> None:
    (job_id,) = accept(sqlite_store, jobs.NewJob("s3://b/a.png", tenant="acme"))
    claim(sqlite_store, [job_id])
    found: list[str] = []

    def erase() -> None:
        try:
            Eraser(settings, sqlite_store, wait_s=5).erase(Scope(tenant="acme"), by="olga")
        except StoreError as error:
            found.append(type(error).__name__)

    sleeper = threading.Thread(target=erase)
    sleeper.start()
    wait_until(lambda: any(one.step == "jobs" for one in sqlite_store.run(receipts.still_open)), 60, "it waits")
    # What another process leaves that took over, finished and gave the role back.
    sqlite_store.run(lambda session: session.execute(delete(LeaseRow)))
    sleeper.join()
    assert found == ["RoleLostError"]


@pytest.mark.parametrize("finished", [False, True], ids=["under way", "done"])
def test_an_image_that_is_named_by_its_hash_is_not_judged_by_who_was_at_it(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """Its job is judged another time: it is of a job that waits, which has no hash."""
    ledger = Recorder(store, settings.worker, "worker")
    erased, beside = ledger.claim(accept(store, "s3://b/a.png", "s3://b/b.png"), below=3)
    if not finished:
        monkeypatch.setattr(Eraser, "_finish_all", lambda *_: None)
    Eraser(settings, store).erase(Scope(sha256=SHA), by="olga")
    found = [judged(erased.id, facts=ImageFacts(SHA, 10)), judged(beside.id, facts=ImageFacts("b" * 64, 10))]
    written = ledger.record(Judged(found, [], {SHA: bytes(768)}), "e" * 64, lambda: None)
    assert written == found[1:], "so a challenger scores that one alone"
    assert [state(store, job.id).value for job in (erased, beside)] == ["accepted", "done"]
    assert embeddings_left(store) == 0
    if finished:
        store.run(lambda session: session.execute(update(table_of(JobRow)).values(not_before=None)))
        claim(store, [erased.id])
        assert write(store, found[0]) == [erased.id], "who began anew is not kept from it"


def test_a_message_that_comes_again_brings_no_erased_job_back(store: Store, settings: Settings) -> None:
    """Its worker died before it acknowledged it."""
    keyed: dict[str, object] = {"uri": "s3://b/keyed.png", "tenant": "acme", "key": "k"}
    items: list[object] = [{"uri": "s3://b/a.png", "tenant": "acme"}, {"uri": "s3://b/b.png"}, keyed]
    first, theirs, named = accept_items(store, items, "m-1")
    Eraser(settings, store).erase(Scope(tenant="acme"), by="olga")
    assert accept_items(store, items, "m-1") == [theirs, named], "a key may be used again"
    assert jobs_there(store) == {theirs, named}
    (other,) = accept_items(store, items[:1], "m-2")
    assert other != first
    assert jobs_there(store) == {theirs, named, other}, "another message is another job"


def jobs_there(store: Store) -> set[str]:
    return {job.id for job in store.run(lambda session: jobs.list_jobs(session, limit=9))}


class Slow(LocalKept):
    """A storage in which a copy is written after everything else that happens `meanwhile`."""

    def __init__(self, root: Path, meanwhile: Callable[[], object]) -> None:
        super().__init__(root)
        self.meanwhile = meanwhile

    def put(self, data: bytes) -> str:
        self.meanwhile()
        return super().put(data)


@pytest.mark.parametrize("noted_anew", [False, True])
def test_a_copy_that_is_written_after_its_image_was_erased_is_deleted(
    sqlite_store: Store, tmp_path: Path, noted_anew: bool
) -> None:
    place = Place(tmp_path, sqlite_store)
    path, kept = place.image("a.png"), open_kept(place.settings)
    job_id = judged_job(sqlite_store, path)

    def erase() -> None:
        Eraser(place.settings, sqlite_store).erase(Scope(tenant="acme"), by="olga")
        if noted_anew:
            place.labeller.label(path, "real", by="rosa")

    labeller = Labeller(place.settings, sqlite_store, kept=Slow(Path(place.settings.resolved_datasets), erase))
    with pytest.raises(DatasetError, match="was erased while it was being labelled"):
        labeller.label(job_id, "fake", by="rob")
    Retention(place.settings, sqlite_store, "one")()
    assert kept.exists(sha256_of(path)) is noted_anew, "of a copy that was noted anew nobody takes the file"


def judged_job(store: Store, path: str) -> str:
    (job_id,) = accept(store, jobs.NewJob(path, tenant="acme"))
    claim(store, [job_id])
    write(store, judged(job_id, uri=path, facts=ImageFacts(sha256_of(path), 10)))
    return job_id


def embeddings_left(store: Store) -> int:
    with store.engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM embeddings").scalar_one())


def encode(settings: Settings, store: Store, meanwhile: Callable[[], object], **more: object) -> None:
    """As a run does, of one image; `meanwhile` happens while it is encoded."""
    embedder = MeanEmbedder(lambda _: meanwhile() and None)
    encoder = SnapshotEncoder(
        embedder, key="e" * 64, settings=settings, store=store, kept=open_kept(settings), **more
    )  # type: ignore[arg-type]
    seen = encoder.see_examples([Example(key="a", label=REAL, read=lambda: DATA)])
    assert np.isfinite(seen.rows[SHA]).all()


def test_what_rescoring_read_before_a_job_was_erased_is_not_written(store: Store, settings: Settings) -> None:
    (job_id,) = accept(store, jobs.NewJob("s3://b/a.png", tenant="acme"))
    claim(store, [job_id])
    verdict = judged(job_id, facts=ImageFacts(SHA, 10))
    write(store, verdict)
    (old,) = store.run(lambda session: [verdict])
    new = judged(job_id, facts=ImageFacts(SHA, 10), revision=1, supersedes=old.id)
    rejudged = Rejudged(pairs=[(old, new)], embeddings={SHA: bytes(768)})
    Eraser(settings, store).erase(Scope(tenant="acme"), by="olga")
    assert not write_rescored(store, rejudged, "f" * 64, keep=True)
    assert embeddings_left(store) == 0


@pytest.mark.parametrize("erases", [True, False])
def test_a_run_keeps_no_embedding_of_an_image_that_was_erased_while_it_was_encoded(
    sqlite_store: Store, settings: Settings, *, erases: bool
) -> None:
    def erase() -> None:
        if erases:
            Eraser(settings, sqlite_store).erase(Scope(sha256=SHA), by="olga")

    sqlite_store.run(lambda session: labels.add(session, [labels.NewLabel(SHA, "fake", "alice", "api")]))
    encode(settings, sqlite_store, erase)
    assert embeddings_left(sqlite_store) == int(not erases)


def test_a_run_whose_token_is_spent_keeps_no_embedding(sqlite_store: Store, settings: Settings) -> None:
    def start(session: Session) -> runs.Run | None:
        return runs.start(session, id=run_id, kind="refit", by="a", owner="a:1", config={}, base_release=None)

    run_id = uuid7()
    run = sqlite_store.run(start)
    assert run is not None
    held = RunLease(sqlite_store, run.lease, lease_s=60, stop=threading.Event())
    with sqlite_store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE runs SET token = token + 1")
    with pytest.raises(RunLostError):
        encode(settings, sqlite_store, lambda: None, write=held.write)
    assert embeddings_left(sqlite_store) == 0


def test_a_snapshot_is_frozen_without_what_was_erased_since_it_was_taken(store: Store, settings: Settings) -> None:
    hashes = label(settings, store, pictures("real", 3), "real")
    taken = store.run(lambda session: snapshots.take(session, settings.labels), write=False)
    Eraser(settings, store).erase(Scope(sha256=hashes[1]), by="olga")
    frozen = store.run(lambda session: snapshots.freeze(session, taken))
    assert {member.sha256 for member in frozen.members} == {hashes[0], hashes[2]}
    assert store.run(lambda session: snapshots.load(session, frozen.id)).members == frozen.members
