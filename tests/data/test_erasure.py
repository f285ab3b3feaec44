"""Erasure, looked for afterwards in every place: rows, database files, copies, releases, runs, logs."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import inspect, make_url, text

from code_worker.data.erasure.erase import Eraser
from code_worker.data.kept_copies import open_kept
from code_worker.errors import ArtifactError, NotAllowedError, RunLostError, StorageError, StoreError
from code_worker.settings import RoleSettings, Settings
from code_worker.store import audit, embeddings, jobs, workers
from code_worker.store.engine import Session, Store
from code_worker.store.erasure import receipts as erasures
from code_worker.store.erasure.receipts import Receipt
from code_worker.store.erasure.scopes import Scope
from code_worker.store.learning import challenger_scores, image_groups, kept_images, labels, runs
from code_worker.store.learning import snapshots as snapshot_table
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.labels import NewLabel
from code_worker.store.leases import LEASE_S, RoleLease, RoleLostError
from code_worker.training.learner import Learner
from code_worker.types import ImageFacts, ShadowScore
from tests.store.acts import accept, claim, judged, write
from tests.training.learning import (
    NEW,
    build_champion,
    held_out,
    label,
    label_world,
    learning_settings,
    promote_champion,
    registry_of,
)

URI = "s3://uploads/private/portrait-of-somebody.png"


@pytest.fixture(scope="module")
def champion_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_champion(tmp_path_factory.mktemp("champion") / "release", heads=("linear", "knn"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return learning_settings(tmp_path / "data")


def judge(store: Store, sha256: str, uri: str = URI, *, tenant: str | None = None) -> str:
    """A job whose verdict, embedding and shadow score are there."""
    (job_id,) = accept(store, jobs.NewJob(uri, tenant=tenant, metadata={"post": 7}))
    claim(store, [job_id])
    facts = ImageFacts(sha256, 1234, "PNG", 32, 32, "RGB", None, None)
    write(store, judged(job_id, uri=uri, facts=facts, tenant=tenant))
    score = ShadowScore(job_id, 0, sha256, "r-2", "linear", 0.1, "real", "r-1", "linear", 0.9, "fake", tenant, None)
    store.run(lambda session: challenger_scores.add(session, [score]))
    return job_id


def keep(settings: Settings, store: Store, data: bytes, said: str, uri: str = URI, **more: str) -> str:
    """A copy with a label and an imported row."""
    sha256 = open_kept(settings).put(data)

    def note(session: Session) -> None:
        kept_images.note_kept(session, [KeptImage(sha256, len(data), "png", 32, 32, uri)])
        labels.add(session, [NewLabel(sha256, said, "alice", "api", uri=uri, note=uri, **more)])  # type: ignore[arg-type]
        image_groups.place(session, {sha256: more.get("group")})
        labels.note_imported(session, {sha256[::-1]: sha256})

    store.run(note)
    return sha256


def files_with(root: Path, *needles: bytes) -> set[str]:
    """Files below a directory that hold one of the needles, by path from there."""
    found = set()
    for path in root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if any(needle in content or needle in str(path).encode() for needle in needles):
                found.add(str(path.relative_to(root)))
    return found


def rows_with(store: Store, *needles: str) -> set[str]:
    """Tables with a row that holds one of the needles; snapshots as unpacked, bytes as hexadecimal digits."""

    def look(session: Session) -> set[str]:
        found = set()
        for table in inspect(store.engine).get_table_names():
            for row in session.execute(text(f"SELECT * FROM {table}")).mappings():
                values = [value.hex() if isinstance(value, bytes) else str(value) for value in row.values()]
                if table == "snapshots":
                    values.append(str(snapshot_table.unpack(bytes(row["members"]))))
                if any(needle in value for value in values for needle in needles):
                    found.add(table)
        return found

    return store.run(look, write=False)


def database_dir(store: Store) -> Path:
    return Path(make_url(store.url).database or "").parent


def vector_of(store: Store, sha256: str) -> bytes:
    def read(session: Session) -> bytes:
        found = session.execute(text("SELECT vector FROM embeddings WHERE sha256 = :it"), {"it": sha256})
        return bytes(found.scalars().first() or b"")

    return store.run(read, write=False)


def erase(settings: Settings, store: Store, wait_s: float = 120, **scope: object) -> Receipt:
    return Eraser(settings, store, wait_s=wait_s).erase(Scope(**scope), by="olga", why="as the law says")  # type: ignore[arg-type]


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def test_an_erased_image_is_found_nowhere_once_the_release_that_learned_from_it_is_replaced(
    store: Store, settings: Settings, champion_dir: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    first = promote_champion(settings, store, champion_dir)
    label_world(settings, store)
    data = next(held_out(NEW, 1, wanted=False))
    sha256 = keep(settings, store, data, "fake", generator=NEW)
    job_id = judge(store, sha256)
    store.run(lambda session: workers.dead_letter(session, task="t", body=f'["{job_id}"]', error="no form"))
    run = Learner(settings, store).learn("refit", by="test")
    assert run is not None
    assert run.state == "promoted", run.reasons
    vector = vector_of(store, sha256)
    hexes = (sha256, URI, job_id, job_id.replace("-", ""), vector.hex())
    needles = (sha256.encode(), URI.encode(), job_id.encode(), job_id.replace("-", "").encode(), vector)
    expected = {"jobs", "verdicts", "labels", "kept_images", "imported_rows", "embeddings", "shadow_scores"}
    assert rows_with(store, *hexes) == {*expected, "snapshots", "dead_letters"}
    before = files_with(tmp_path, *needles)
    assert any(str(run.candidate) in path for path in before), "a head holds the embedding"

    receipt = erase(settings, store, sha256=sha256)

    assert receipt.state == "done"
    assert receipt.last_look == {"rows": 0, "copies": 0, "jobs": 0, "letters": 0, "late": 0}
    assert rows_with(store, *hexes) == set()
    assert {path.split("/")[1:3][-1] for path in files_with(tmp_path, *needles)} == {str(run.candidate)}
    assert receipt.releases == {str(run.candidate): {"how": "learned", "files": "waiting"}}
    assert (receipt.counts["jobs"], receipt.counts["copies"], receipt.counts["snapshots"]) == (1, 1, 1)
    assert not (settings.data_path / "runs" / run.id).exists()

    again = Learner(settings, store).learn("refit", by="test")
    assert again is not None
    assert again.state == "promoted", again.reasons
    Eraser(settings, store).resume()
    assert files_with(tmp_path, *needles) == set()
    assert not any(needle in record.getMessage() for record in messages.records for needle in hexes)
    (settled,) = store.run(erasures.list_receipts)
    assert settled.releases[str(run.candidate)]["files"] == "deleted"
    registry = registry_of(settings, store)
    with pytest.raises(ArtifactError, match="must not be promoted: its files were deleted"):
        registry.promote(str(run.candidate), by="test")
    assert first in registry._artifacts.list(), "what never learned from it stays"
    assert store.run(lambda session: erasures.was_erased(session, "image", sha256))[0].id == receipt.id
    assert store.run(lambda session: erasures.was_erased(session, "image", "f" * 64)) == []
    assert audit.verify(store).flaws == ()
    entry = store.run(lambda session: audit.last(session, action="erasure.done"))
    assert entry is not None
    assert (entry.actor, entry.subject) == ("olga", receipt.id)


def test_what_other_jobs_share_stays_with_them(store: Store, settings: Settings) -> None:
    shared = keep(settings, store, b"shared", "real")
    own = keep(settings, store, b"own", "real")
    mine, also_mine = judge(store, shared, tenant="acme"), judge(store, own, tenant="acme")
    other = judge(store, shared, uri="s3://uploads/other.png", tenant="zeta")
    receipt = erase(settings, store, tenant="acme")
    assert (receipt.scope, receipt.counts["jobs"], receipt.counts["images_shared"]) == ("tenant", 2, 1)
    left = store.run(lambda session: [job.id for job in jobs.list_jobs(session, limit=9)])
    assert left == [other]
    assert open_kept(settings).exists(shared)
    assert not open_kept(settings).exists(own)
    said = store.run(lambda session: labels.list_labels(session, limit=9))
    assert [one.sha256 for one in said] == [shared]
    for kind, value in (("job", mine), ("job", also_mine), ("image", own), ("tenant", "acme")):
        assert store.run(lambda session, k=kind, v=value: erasures.was_erased(session, k, v)), kind
    assert not store.run(lambda session: erasures.was_erased(session, "image", shared)), "it was not"
    assert rows_with(store, "acme") == set()


def test_a_job_goes_with_its_image(store: Store, settings: Settings) -> None:
    sha256 = hashlib.sha256(b"data").hexdigest()
    job_id = judge(store, sha256)
    keep(settings, store, b"data", "real", job_id=job_id)
    (waiting,) = accept(store, "s3://b/waits.png")
    assert erase(settings, store, job=job_id).counts["images"] == 1
    assert erase(settings, store, job=waiting).counts.get("images", 0) == 0
    assert rows_with(store, sha256, job_id, waiting, "waits.png") == set()


def test_group_and_perceptual_hash_of_an_image_go_with_it(store: Store, settings: Settings) -> None:
    phash, data = "0123456789abcdef", next(held_out(NEW, 1, wanted=False))
    note = KeptImage(hashlib.sha256(data).hexdigest(), len(data), "png", 32, 32, URI, phash)
    store.run(lambda session: kept_images.note_kept(session, [note]))
    old = keep(settings, store, data, "fake", group="post 4711")
    place = store.run(lambda session: image_groups.places(session, [old]))[old]
    assert rows_with(store, place.group, phash) == {"kept_images", "image_groups"}
    assert rows_with(store, "post 4711") == {"labels"}
    erase(settings, store, sha256=old)
    assert rows_with(store, place.group, phash, "post 4711") == set()


def test_what_is_older_than_a_day_and_was_not_spoken_of_since_goes(store: Store, settings: Settings) -> None:
    old = keep(settings, store, b"old", "real")
    renewed = keep(settings, store, b"renewed", "real")
    judge(store, old)
    moment = datetime.now(UTC) + timedelta(milliseconds=50)
    while datetime.now(UTC) < moment:
        pass
    store.run(lambda session: labels.add(session, [NewLabel(renewed, "fake", "bob", "api")]))
    late = judge(store, "e" * 64)
    receipt = erase(settings, store, before=moment)
    assert receipt.scope.startswith("before 20")
    assert rows_with(store, old) == set()
    assert open_kept(settings).exists(renewed)
    assert [job.id for job in store.run(lambda session: jobs.list_jobs(session, limit=9))] == [late]


def test_a_preview_counts_and_writes_nothing(store: Store, settings: Settings) -> None:
    sha256 = keep(settings, store, b"data", "real")
    judge(store, sha256, tenant="acme")
    found = Eraser(settings, store).preview(Scope(tenant="acme"))
    assert (found.jobs, found.images, found.shared, found.labels, found.copies) == (1, 1, 0, 1, 1)
    assert store.run(erasures.list_receipts) == []
    assert store.run(lambda session: jobs.list_jobs(session, limit=9))


STEPS = ("_open", "_erase_jobs", "_erase_strays", "_erase_addresses", "_erase_letters", "_look", "_close", "settle")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_erasure_that_died_half_way_is_finished_by_the_next(
    sqlite_store: Store, settings: Settings, step: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = keep(settings, sqlite_store, b"data", "real")
    job_id = judge(sqlite_store, sha256)
    original = getattr(Eraser, step)

    def die(*arguments: object, **named: object) -> object:
        if moment == "after":
            original(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Eraser, step, die)
    with pytest.raises(KeyboardInterrupt):
        erase(settings, sqlite_store, sha256=sha256)
    monkeypatch.undo()
    receipt = erase(settings, sqlite_store, sha256=sha256)
    assert receipt.state == "done"
    assert sqlite_store.run(erasures.still_open) == []
    assert rows_with(sqlite_store, sha256, job_id, job_id.replace("-", "")) == set()
    assert files_with(settings.data_path, sha256.encode()) == set()
    assert files_with(database_dir(sqlite_store), sha256.encode(), URI.encode()) == set()


def test_only_an_operator_may_erase(store: Store, settings: Settings) -> None:
    strict = settings.model_copy(update={"roles": RoleSettings(operators=("olga",), reviewers=("rita",))})
    judge(store, "a" * 64)
    with pytest.raises(NotAllowedError, match="rita has the role reviewer and may not erase"):
        Eraser(strict, store).erase(Scope(sha256="a" * 64), by="rita")
    assert store.run(erasures.list_receipts) == []
    assert Eraser(strict, store).erase(Scope(sha256="a" * 64), by="olga").state == "done"


def test_two_do_not_erase_at_once_and_who_died_keeps_nobody_from_it(store: Store, settings: Settings) -> None:
    judge(store, "a" * 64)
    other = RoleLease(store, "erasure", "somebody", doing="erasing", wait_s=0)
    with other, pytest.raises(StoreError, match="another process is erasing"):
        erase(settings, store, sha256="a" * 64, wait_s=0)
    # Of a process that was killed: it gave no sign of life since.
    store.run(lambda session: workers.take_lease(session, "erasure", "somebody", 0.7))
    assert erase(settings, store, sha256="a" * 64).state == "done"
    with pytest.raises(RoleLostError, match="another process took over"):
        store.run(lambda session: workers.take_lease(session, "erasure", "a third", 60)) and other.write(
            lambda _: None
        )


def test_a_holder_that_lives_is_not_waited_for(sqlite_store: Store, settings: Settings) -> None:
    def renew() -> None:
        while not done.wait(0.1):
            sqlite_store.run(lambda session: workers.take_lease(session, "erasure", "somebody", 60))

    judge(sqlite_store, "a" * 64)
    done = threading.Event()
    sqlite_store.run(lambda session: workers.take_lease(session, "erasure", "somebody", 60))
    holder = threading.Thread(target=renew)
    holder.start()
    began = time.monotonic()
    with pytest.raises(StoreError, match="another process is erasing"):
        erase(settings, sqlite_store, sha256="a" * 64)
    assert time.monotonic() - began < LEASE_S / 2
    done.set()
    holder.join()


def test_a_job_that_is_being_judged_is_waited_for(store: Store, settings: Settings) -> None:
    (job_id,) = accept(store, "s3://b/a.png")
    claim(store, [job_id])
    with pytest.raises(StoreError, match="1 of the jobs are being judged right now"):
        erase(settings, store, job=job_id, wait_s=1.2)
    assert store.run(erasures.still_open), "it is not forgotten"
    assert not removals(store), "who waits has removed nothing"
    # Its worker died, or answers: the lease lapses within the time that is waited.
    store.run(lambda session: jobs.renew(session, owner="worker", lease_s=1))
    assert erase(settings, store, job=job_id, wait_s=120).state == "done"
    assert store.run(erasures.still_open) == []
    assert rows_with(store, job_id, "s3://b/a.png") == set()
    assert len(removals(store)) == 1


def removals(store: Store) -> list[audit.Entry]:
    wanted = audit.AuditFilter(action="erasure.remove")
    return store.run(lambda session: audit.list_entries(session, wanted, limit=99), write=False)


def test_a_run_under_way_that_learns_from_it_ends_and_its_process_writes_nothing_more(
    store: Store, settings: Settings, champion_dir: Path
) -> None:
    promote_champion(settings, store, champion_dir)
    label_world(settings, store)
    (sha256,) = label(settings, store, held_out(NEW, 1, wanted=False), "fake", generator=NEW)
    receipts: list[Receipt] = []

    def interfere(stage: str, _facts: object) -> None:
        if stage == "gate" and not receipts:
            with pytest.raises(StorageError, match="still works in"):
                erase(settings, store, sha256=sha256, wait_s=0.1)
            receipts.extend(store.run(erasures.still_open))

    with pytest.raises(RunLostError):
        Learner(settings, store, listen=interfere).learn("refit", by="test")
    (run,) = store.run(runs.list_runs)
    assert (run.state, run.reasons[0][:32]) == ("failed", "an image that it learned from wa")
    assert Eraser(settings, store).resume() == 1
    assert rows_with(store, sha256) == set()
    assert not (settings.data_path / "runs" / run.id).exists()


def test_embeddings_of_every_encoder_go(store: Store, settings: Settings) -> None:
    sha256 = "c" * 64

    def keep_some(session: Session) -> None:
        for encoder in ("1" * 64, "2" * 64, "3" * 64):
            embeddings.keep(session, encoder, {sha256: bytes(768), "d" * 64: bytes(768)})

    store.run(keep_some)
    assert erase(settings, store, sha256=sha256).counts["embeddings"] == 3
    assert rows_with(store, sha256) == set()
