"""Erasure beside those who write: workers, labellers, challengers; erasers that die; jobs that are gone already."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text

from code_worker.data.erasure.erase import Eraser
from code_worker.data.kept_copies import open_kept
from code_worker.data.labelling import Labeller
from code_worker.errors import DatasetError, StoreError
from code_worker.moderation.judge import JobFault, Judged
from code_worker.settings import FileSettings, RetentionSettings, Settings
from code_worker.store import jobs, retention, workers
from code_worker.store.engine import Session, Store
from code_worker.store.erasure import receipts as erasures
from code_worker.store.erasure.receipts import Receipt
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import uuid7
from code_worker.store.learning import kept_images, labels
from code_worker.store.models import Base
from code_worker.types import ImageFacts, Job, RejectReason
from code_worker.worker.intake import dead_letter
from code_worker.worker.judging.recorder import Recorder
from code_worker.worker.retention import Retention
from tests.image_files import encoded, pixels
from tests.store.acts import accept, claim, judged
from tests.worker.harness import wait_until

ENCODER = "e" * 64


class Place:
    """A deployment without a broker: images that may be read, a ledger that a worker writes, an eraser."""

    def __init__(self, root: Path, store: Store) -> None:
        self.store = store
        self.root = root / "photos"
        self.root.mkdir()
        self.settings = Settings(
            data_dir=root / "data",
            database_url=store.url,
            files=FileSettings(roots=(self.root,)),
            retention=RetentionSettings(interval_s=0.1),
        )
        self.labeller = Labeller(self.settings, store)
        self.ledger = Recorder(store, self.settings.worker, "worker")

    def image(self, name: str, seed: int = 1) -> str:
        path = self.root / name
        path.write_bytes(encoded(pixels(8, 8, seed), "PNG"))
        return str(path)

    def job(self, uri: str, tenant: str | None = "acme", **more: object) -> str:
        (job_id,) = accept(self.store, jobs.NewJob(uri, tenant=tenant, **more))  # type: ignore[arg-type]
        return job_id

    def take(self, *job_ids: str) -> list[Job]:
        return claim(self.store, job_ids)

    def finish(self, claimed: list[Job]) -> None:
        """As a worker whose batch is judged."""
        found, vectors = [], {}
        for job in claimed:
            data = Path(job.uri).read_bytes()
            facts = ImageFacts(hashlib.sha256(data).hexdigest(), len(data), "PNG", 8, 8, "RGB")
            found.append(judged(job.id, uri=job.uri, facts=facts, tenant=job.tenant, revision=job.revision))
            vectors[facts.sha256] = bytes(768)
        self.ledger.record(Judged(found, [], vectors), ENCODER, lambda: None)

    def judge(self, *job_ids: str) -> None:
        self.finish(self.take(*job_ids))

    def erase(self, wait_s: float = 60.0, **scope: object) -> Receipt:
        asked = Scope(**(scope or {"tenant": "acme"}))  # type: ignore[arg-type]
        return Eraser(self.settings, self.store, wait_s=wait_s).erase(asked, by="olga")

    def count(self, table: str, where: str = "true") -> int:
        with self.store.engine.connect() as connection:
            return int(connection.execute(text(f"SELECT count(*) FROM {table} WHERE {where}")).scalar_one())

    def change(self, statement: str) -> None:
        with self.store.engine.begin() as connection:
            connection.execute(text(statement))

    def copies(self) -> set[str]:
        return {path.name for path in Path(self.settings.resolved_datasets).glob("??/??/*")}

    def text(self) -> str:
        """Every row of every table but the audit, as text."""
        with self.store.engine.connect() as connection:
            tables = Base.metadata.tables
            rows = [connection.execute(table.select()).all() for name, table in tables.items() if name != "audit"]
        return "\n".join(map(str, rows))


@pytest.fixture
def place(tmp_path: Path, store: Store) -> Place:
    return Place(tmp_path, store)


@pytest.fixture
def quick(tmp_path: Path, sqlite_store: Store) -> Place:
    return Place(tmp_path, sqlite_store)


def sha256_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def while_the_eraser_waits(place: Place, claimed: list[Job], meanwhile: Callable[[], None]) -> Receipt:
    """Erases while a worker has jobs, which ends in order once `meanwhile` is done."""
    receipts: list[Receipt] = []
    eraser = threading.Thread(target=lambda: receipts.append(place.erase()))
    eraser.start()
    wait_until(lambda: any(one.step == "jobs" for one in place.store.run(erasures.still_open)), 60, "it waits")
    meanwhile()
    place.finish(claimed)
    eraser.join()
    return receipts[0]


def test_what_is_judged_and_labelled_while_the_eraser_waits_goes_as_well(place: Place) -> None:
    path = place.image("private.png")
    claimed = place.take(place.job(path), place.job(place.image("theirs.png", 2), "other"))
    place.labeller.label(path, "fake", by="rob")

    def label() -> None:
        with pytest.raises(DatasetError, match="no job has the id"):
            place.labeller.label(place.job(path, "other", key="gone")[:-1] + "0", "fake", by="rob")
        place.labeller.label(path, "real", by="rosa")

    receipt = while_the_eraser_waits(place, claimed, label)
    assert receipt.state == "done"
    assert place.store.run(lambda session: erasures.was_erased(session, "image", sha256_of(path)))
    assert place.count("verdicts") == 1
    assert place.count("embeddings") == 1, "of the other tenant's image"


def test_what_a_tenant_has_accepted_since_is_none_of_the_erasure(place: Place) -> None:
    """A tenant that goes on working neither holds it up nor loses what it sends meanwhile."""
    claimed, held = place.take(place.job(place.image("old.png"))), list[Job]()

    def go_on() -> None:
        later = place.job(place.image("new.png", 2))
        place.judge(later, place.job(place.image("same.png")))
        place.labeller.label(later, "fake", by="rob")
        place.store.run(partial(jobs.retry, ids=[later]))
        held.extend(place.take(later, place.job(place.image("busy.png", 3))))

    receipt = while_the_eraser_waits(place, claimed, go_on)
    assert (receipt.counts["jobs"], receipt.counts["images_shared"]) == (1, 1)
    assert (place.count("jobs"), place.count("verdicts"), place.count("labels")) == (3, 2, 1)
    assert (place.count("embeddings"), place.copies()) == (2, {sha256_of(str(place.root / "new.png"))})
    place.finish(held)
    assert place.erase().counts["jobs"] == 3
    assert (place.count("jobs"), place.count("embeddings"), place.copies()) == (0, 0, set())


def test_who_asks_again_for_what_is_under_way_means_what_was_accepted_until_then(quick: Place) -> None:
    claimed = quick.take(quick.job(quick.image("a.png")))
    with pytest.raises(StoreError, match="1 of the jobs are being judged"):
        quick.erase(wait_s=0)
    quick.judge(quick.job(quick.image("b.png", 2)))
    quick.finish(claimed)
    assert quick.erase().counts["jobs"] == 2
    assert len(quick.store.run(erasures.list_receipts)) == 1


def test_an_image_that_is_being_erased_is_not_labelled_and_can_be_afterwards(
    quick: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quick.image("private.png")
    job_id = quick.job(path)
    quick.judge(job_id)
    drop = quick.labeller._kept.__class__.drop
    refused: list[str] = []

    def label_first(kept: object, sha256: str) -> bool:
        for target in (job_id, path):
            with pytest.raises(DatasetError) as raised:
                quick.labeller.label(target, "fake", by="rob")
            refused.append(str(raised.value))
        return drop(kept, sha256)  # type: ignore[arg-type]

    monkeypatch.setattr(quick.labeller._kept.__class__, "drop", label_first)
    quick.erase()
    assert ["no job has the id" in refused[0], "was erased while it was being labelled" in refused[1]] == [True, True]
    assert (quick.copies(), quick.count("labels"), quick.count("kept_images")) == (set(), 0, 0)
    monkeypatch.undo()
    assert quick.labeller.label(path, "fake", by="rob").new
    assert quick.copies() == {sha256_of(path)}


def test_what_retention_left_of_a_tenants_jobs_is_found(place: Place) -> None:
    path, theirs = place.image("private.png"), place.image("theirs.png", 2)
    shared, same = place.image("shared.png", 3), place.image("same.png", 3)
    ours = [place.job(path), place.job(shared)]
    others = [place.job(theirs, "other"), place.job(same, "other")]
    place.judge(*ours, *others)
    for job_id in (ours[0], others[0], others[1]):
        place.labeller.label(job_id, "fake", by="rob")
    threading.Event().wait(0.05)
    assert place.store.run(lambda session: retention.jobs(session, 0.01 / 86_400, 100)) == 4
    receipt = place.erase()
    assert (receipt.counts["origins"], receipt.counts["images"], receipt.counts["images_shared"]) == (2, 1, 1)
    assert place.copies() == {sha256_of(theirs), sha256_of(shared)}
    assert place.count("labels") == 2
    assert place.count("embeddings") == 2
    assert "private.png" not in place.text()
    assert place.erase(tenant="other").counts["images"] == 2
    assert place.count("image_origins") == 0


def test_whose_image_it_was_is_forgotten_with_the_last_that_is_kept_of_it(quick: Place) -> None:
    quick.judge(quick.job(quick.image("a.png")))
    threading.Event().wait(0.05)
    for kind in ("jobs", "embeddings"):
        assert quick.count("image_origins") == int(kind == "embeddings")
        quick.store.run(lambda session, kind=kind: retention.PRUNERS[kind](session, 0.01 / 86_400, 9))
    assert quick.count("image_origins") == 0


def test_addresses_go_from_what_is_said_of_shared_bytes(place: Place) -> None:
    ours, theirs = place.image("acme-passport.png"), place.image("b.png")
    first, second = place.job(ours), place.job(theirs, "other")
    place.judge(first, second)
    place.labeller.label(ours, "fake", by="rob", note=f"seen at file://{ours}")
    place.labeller.label(first, "fake", by="rosa")
    place.labeller.label(second, "fake", by="theo")
    receipt = place.erase()
    said = place.store.run(lambda session: labels.list_labels(session, limit=9))
    assert {(one.by, one.uri) for one in said} == {("rob", None), ("rosa", None), ("theo", theirs)}
    assert {one.job_id for one in said} == {None, second}
    assert place.copies() == {sha256_of(ours)}
    assert "acme" not in place.text()
    assert receipt.counts["addresses"] == 1


def test_an_image_that_was_labelled_by_address_alone_goes_with_its_unjudged_job(quick: Place) -> None:
    path = quick.image("private one.png")
    job_id = quick.job(f"file://{path}?versionId=7".replace(" ", "%20"))
    quick.labeller.label(path, "fake", by="rob")
    assert quick.erase(job=job_id).counts["images"] == 1
    assert (quick.copies(), quick.count("labels"), quick.count("kept_images")) == (set(), 0, 0)


def test_letters_are_read_and_not_searched(place: Place) -> None:
    odd = [str(place.root / name) for name in ("ü.png", 'a"b.png', "ein Bild.png", "𝄞.png")]
    ids = [place.job(uri) for uri in odd]
    kept = [{"uri": "s3://b/other.png", "tenant": "other"}, {"uri": odd[0], "tenant": "other"}]
    letters = [{"v": 9, "items": [{"uri": uri}]} for uri in odd]
    letters += [{"v": 9, "items": [{"uri": "s3://b/never-accepted.png", "tenant": "acme", "bogus": 1}, *kept]}]
    letters += [{"v": 9, "items": [{"uri": odd[2].replace(" ", "%20")}]}, {"v": 9, "jobs": [ids[0], "x"]}]
    for letter in letters:
        dead_letter(
            place.store, letter, f"id_conflict: key 'k' of tenant 'acme' already names another job ({ids[0]})"
        )
    cut = '{"v":9,"items":[{"uri":"s3://b/never.png","tenant":"acme"},{"uri":"s3'
    place.store.run(lambda session: workers.dead_letter(session, task="t", body=cut, error="e") and None)
    place.store.run(lambda session: workers.dead_letter(session, task="t", body="acme", error="e") and None)
    place.erase()
    left = place.store.run(workers.list_dead_letters)
    assert sorted(one.body for one in left) == [
        "acme",
        '{"v": 9, "items": [{"uri": "s3://b/other.png", "tenant": "other"}, '
        f'{{"uri": "{odd[0]}", "tenant": "other"}}]}}'.replace("ü", "\\u00fc"),
        '{"v": 9, "jobs": ["x"]}',
    ]
    assert not any("acme" in one.error or ids[0] in one.error for one in left)


def test_a_paused_source_names_no_object(quick: Place, caplog: pytest.LogCaptureFixture) -> None:
    from code_worker.images.s3_errors import Fault

    uri = "s3://uploads/acme/passport.jpg"
    (job,) = quick.take(quick.job(uri))
    error = Fault.CREDENTIALS.error("s3://uploads", uri, "ExpiredToken (400)")
    assert "passport" in str(error), "of the job it tells which object"
    fault = JobFault(job, RejectReason.FETCH_FAILED, str(error), "s3://uploads", blame=False, cause=error.cause)  # type: ignore[union-attr]
    quick.ledger.record(Judged([], [fault], {}), ENCODER, lambda: None)
    (pause,) = quick.store.run(workers.paused_sources).values()
    assert pause.detail == "ExpiredToken (400): credentials are missing, wrong or expired"
    assert "passport" not in caplog.text
    # A worker of an older version, beside ours while a deployment is upgraded.
    quick.change(f"UPDATE source_pauses SET detail = '{error}'")
    quick.change("UPDATE jobs SET state = 'accepted'")
    quick.erase()
    assert "passport" not in quick.text()


def test_a_copy_that_its_labeller_never_spoke_of_goes_with_retention(quick: Place) -> None:
    path = quick.image("a.png")
    found = quick.labeller.find(path)
    assert quick.copies() == {found.image.sha256}
    sweep = Retention(quick.settings, quick.store, "one")
    sweep()
    assert quick.copies() == {found.image.sha256}, "its labeller may be alive"
    quick.change("UPDATE kept_images SET created_at = datetime('now', '-2 hours')")
    Retention(quick.settings, quick.store, "one")()
    assert quick.copies() == set()
    assert (quick.count("kept_images"), quick.count("copies_to_drop")) == (0, 0)


def test_labels_that_retention_forgets_take_no_copy_from_who_labels_at_that_moment(quick: Place) -> None:
    path = quick.image("a.png")
    sha256 = quick.labeller.label(path, "fake", by="rob").sha256

    def forget(session: Session) -> None:
        kept_images.to_drop(session, [sha256])
        session.execute(text("DELETE FROM kept_images"))

    found = quick.labeller.find(path)
    quick.store.run(forget)
    new = labels.NewLabel(sha256, "real", "rosa", "api", uri=path)
    assert quick.labeller.record([new], actor="rosa").erased == {found.image.sha256}
    with pytest.raises(DatasetError, match="its copy is just being deleted"):
        quick.labeller.label(path, "real", by="rosa")
    Retention(quick.settings, quick.store, "one")()
    assert quick.labeller.label(path, "real", by="rosa").new
    assert open_kept(quick.settings).exists(sha256)


def test_the_columns_statistics_name_nothing_that_is_gone(postgres_store: Store, tmp_path: Path) -> None:
    place = Place(tmp_path, postgres_store)
    many = [jobs.NewJob("s3://b/same.jpg", tenant="acme") for _ in range(200)]
    accept(postgres_store, *many, *(jobs.NewJob(f"s3://b/{number}.jpg", tenant="other") for number in range(50)))
    place.change("ANALYZE jobs")
    known = "SELECT count(*) FROM pg_stats WHERE most_common_vals::text LIKE '%acme%' AND tablename = 'jobs'"

    def named() -> int:
        with postgres_store.engine.connect() as connection:
            return int(connection.execute(text(known)).scalar_one())

    assert named() == 1
    place.erase()
    assert named() == 0


def test_an_erasure_of_a_version_that_kept_no_scope_says_so(quick: Place) -> None:
    path = quick.image("a.png")
    job_id = quick.job(path)
    quick.judge(job_id)
    theirs = quick.job(quick.image("same.png"), "other")
    quick.judge(theirs)

    erasure_id = uuid7()

    def begin(session: Session) -> None:
        erasures.begin(session, id=erasure_id, scope="tenant", target={}, by="olga", why="", salt="ab")
        erasures.add_targets(session, erasure_id, erasures.JOB, [job_id])
        erasures.add_targets(session, erasure_id, erasures.IMAGE, [sha256_of(path)])

    quick.store.run(begin)
    quick.change("UPDATE erasures SET target = NULL")
    assert Eraser(quick.settings, quick.store).resume() == 1
    (receipt,) = quick.store.run(erasures.list_receipts)
    assert receipt.last_look is not None
    assert receipt.last_look["scope_unknown"] == 1
    assert (quick.count("jobs"), quick.count("embeddings")) == (1, 1), "the other tenant's stay"


def test_who_said_the_same_of_another_tenants_job_keeps_what_they_said(place: Place) -> None:
    first, second = place.job(place.image("a.png")), place.job(place.image("b.png"), "other")
    place.judge(first)
    place.labeller.label(first, "fake", by="rob")
    assert not place.labeller.label(second, "fake", by="rob").new, "the same bytes"
    receipt = place.erase()
    assert (receipt.counts["images_shared"], place.count("labels"), len(place.copies())) == (1, 1, 1)
    assert place.erase(tenant="other").counts["labels"] == 1
    assert (place.count("image_origins"), place.copies()) == (0, set())


def test_an_image_named_by_its_hash_goes_without_what_else_its_job_judged(quick: Place) -> None:
    path = quick.image("a.png")
    before, job_id = sha256_of(path), quick.job(path)
    quick.judge(job_id)
    quick.image("a.png", 2)
    quick.store.run(lambda session: jobs.retry(session, [job_id]))
    quick.judge(job_id)
    threading.Event().wait(0.05)
    assert quick.store.run(lambda session: retention.superseded(session, 0.01 / 86_400, 9)) == 1
    assert quick.count("image_origins") == 2, "the object changed between two tries"
    assert quick.erase(sha256=before).counts["embeddings"] == 1
    assert before not in quick.text()
    assert (quick.count("jobs"), quick.count("verdicts"), quick.count("embeddings")) == (1, 1, 1)
    assert quick.erase().counts["embeddings"] == 1
