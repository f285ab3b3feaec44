"""A tenant erased while everything writes, by an eraser that dies again and again; then every table is read."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text

from code_worker.data.erasure import erase as erasure
from code_worker.data.erasure.erase import Eraser
from code_worker.data.labelling import Labeller
from code_worker.errors import DatasetError, StoreError
from code_worker.moderation.judge import Judged
from code_worker.settings import FileSettings, Settings
from code_worker.store import embeddings, jobs, verdicts
from code_worker.store.engine import Session, Store
from code_worker.store.erasure import personal
from code_worker.store.erasure import receipts as erasures
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import uuid7
from code_worker.store.learning import challenger_scores
from code_worker.store.leases import RoleLease
from code_worker.store.models import Base
from code_worker.types import ImageFacts, Label, ShadowScore, Verdict
from code_worker.worker.judging.recorder import Recorder
from tests.image_files import encoded, pixels
from tests.store.acts import accept, claim, judged

ENCODER, CHALLENGER, TRAINED = "e" * 64, "d" * 64, "f" * 64
EACH = 24
"""Jobs of each tenant; every third has the same bytes as one of the other's."""


class DiedError(BaseException):
    """Stands for a process that is killed."""


class Storm:
    """Two tenants, and what reads and writes in a deployment, each as a function that does one thing at random."""

    def __init__(self, root: Path, store: Store, seed: int) -> None:
        self.store = store
        self.root = root / "photos"
        self.root.mkdir()
        self.settings = Settings(
            data_dir=root / "data", database_url=store.url, files=FileSettings(roots=(self.root,))
        )
        self.labeller = Labeller(self.settings, store)
        self.seed = seed
        self.stopping = threading.Event()
        self.labelled: set[str] = set()
        self.late: list[Callable[[], object]] = []
        self.paths = {(tenant, n): self._image(tenant, n) for tenant in ("acme", "other") for n in range(EACH)}
        new = [jobs.NewJob(str(path), tenant=tenant) for (tenant, _), path in self.paths.items()]
        ids = accept(store, *new)
        self.mine = ids[:EACH]
        self.others = ids[EACH:]

    def _image(self, tenant: str, number: int) -> Path:
        path = self.root / f"{tenant}-{number}.png"
        seed = number if number % 3 == 0 or tenant == "acme" else 1000 + number
        path.write_bytes(encoded(pixels(8, 8, seed), "PNG"))
        return path

    def sha256_of(self, tenant: str, number: int) -> str:
        return hashlib.sha256(self.paths[tenant, number].read_bytes()).hexdigest()

    def worker(self, rng: random.Random) -> None:
        ledger = Recorder(self.store, self.settings.worker, f"worker-{rng.random()}")
        asleep = rng.random() < 0.3
        taken = claim(self.store, rng.sample([*self.mine, *self.others], 4), lease_s=0.0 if asleep else 30.0)
        found, vectors = list[Verdict](), dict[str, bytes]()
        for job in taken:
            facts = ImageFacts(hashlib.sha256(Path(job.uri).read_bytes()).hexdigest(), 10, "PNG", 8, 8, "RGB")
            found.append(judged(job.id, uri=job.uri, facts=facts, tenant=job.tenant, revision=job.revision))
            vectors[facts.sha256] = bytes(768)
        record = partial(ledger.record, Judged(found, [], vectors), ENCODER, lambda: None)
        self.late.extend(partial(self.store.run, partial(self.challenge, verdict=verdict)) for verdict in found)
        if asleep:
            # Over its lease: others claim the same jobs, and it writes when they are long gone.
            self.late.append(record)
            return
        self.rest(rng)
        record()

    def challenge(self, session: Session, verdict: Verdict) -> None:
        sha256 = verdict.sha256 or ""
        score = ShadowScore(
            verdict.job_id,
            verdict.revision,
            sha256,
            *("r-2", "linear", 0.2, Label.REAL),
            *("r-1", "linear", 0.9, Label.FAKE),
            tenant=verdict.tenant,
        )
        challenger_scores.add(session, [score])
        embeddings.keep(session, CHALLENGER, {sha256: bytes(768)}, jobs={sha256: [verdict.job_id]})

    def challenger(self, rng: random.Random) -> None:
        if self.late:
            rng.choice(self.late)()

    def label(self, rng: random.Random) -> None:
        job_id = rng.choice([*self.mine, *self.others])
        with suppress(DatasetError):
            self.labeller.label(job_id, "fake", by="rob")
            self.labelled.add(job_id)

    def rescore(self, rng: random.Random) -> None:
        wanted = verdicts.RescoreFilter(since=datetime(2020, 1, 1, tzinfo=UTC))
        page = self.store.run(lambda session: verdicts.page(session, wanted, limit=8), write=False)
        self.rest(rng)
        new = [replace(old, id=uuid7(), revision=job.revision, supersedes=old.id) for job, old in page.judged]
        self.store.run(lambda session: verdicts.replace_live(session, new))

    def train(self, rng: random.Random) -> None:
        since = self.store.run(personal.moment)
        with self.store.engine.connect() as connection:
            kept = list(connection.execute(text("SELECT sha256 FROM kept_images")).scalars())
        self.rest(rng)
        vectors = dict.fromkeys(kept, bytes(768))
        self.store.run(lambda session: embeddings.keep(session, TRAINED, vectors, since=since))

    def rest(self, rng: random.Random) -> None:
        self.stopping.wait(rng.uniform(0, 0.05))

    def loop(self, what: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not self.stopping.is_set():
            what(rng)
            self.rest(rng)

    def erase(self, monkeypatch: pytest.MonkeyPatch) -> int:
        """Until it is done; returns how often the eraser died."""
        rng, original, died = random.Random(f"{self.seed} eraser"), RoleLease.write, 0

        def write(turn: RoleLease, work: Callable[[Session], object]) -> object:
            if rng.random() < 0.05:
                raise DiedError
            result = original(turn, work)
            if rng.random() < 0.05:
                raise DiedError
            return result

        monkeypatch.setattr(RoleLease, "write", write)
        monkeypatch.setattr(erasure, "_PAGE", 8)
        while True:
            try:
                Eraser(self.settings, self.store, wait_s=5).erase(Scope(tenant="acme"), by="olga")
            except DiedError:
                died += 1
            except StoreError as error:
                # Workers have some of it; or it died the last time when the receipt was closed.
                if "being judged" not in str(error) and "nothing is kept of the tenant" not in str(error):
                    raise
            receipts = self.store.run(erasures.list_receipts)
            if receipts and all(receipt.state == "done" for receipt in receipts):
                return died

    def rows(self) -> Iterator[tuple[str, str]]:
        with self.store.engine.connect() as connection:
            for name, table in Base.metadata.tables.items():
                for row in connection.execute(table.select()):
                    yield name, str(row)


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_left_of_the_tenant_and_everything_of_the_other(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    storm = Storm(tmp_path, store, seed)
    acts = [storm.worker, storm.worker, storm.challenger, storm.label, storm.rescore, storm.train]
    with ThreadPoolExecutor(len(acts)) as pool:
        running = [pool.submit(storm.loop, act, number) for number, act in enumerate(acts)]
        try:
            while store.run(lambda session: len(verdicts.list_verdicts(session, limit=EACH))) < EACH:
                storm.stopping.wait(0.02)
            assert storm.erase(monkeypatch) > 0
            # What was at it when the erasure ended writes now.
            storm.stopping.wait(0.3)
        finally:
            storm.stopping.set()
        for each in running:
            each.result()
    for write in storm.late:
        write()

    own = {storm.sha256_of("acme", number) for number in range(EACH) if number % 3}
    needles = {"acme", *own, *storm.mine}
    assert {(name, needle) for name, row in storm.rows() for needle in needles if needle in row} == set()
    copies = {path.name for path in Path(storm.settings.resolved_datasets).glob("??/??/*")}
    assert not copies & own
    assert [job.id for job in store.run(lambda session: jobs.list_jobs(session, limit=999))] == storm.others[::-1]
    said = {row for name, row in storm.rows() if name == "labels"}
    for number, job_id in enumerate(storm.others):
        if job_id in storm.labelled:
            # Of shared bytes the same was said before, perhaps by a job that is gone now.
            sha256 = storm.sha256_of("other", number)
            assert any(sha256 in row for row in said), "what was said of another tenant's image is gone"
            assert sha256 in copies, "and its copy"
