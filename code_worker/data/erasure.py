"""Erasure: everything that is kept of jobs and images goes, whatever dies on the way, and a receipt stays.

What is to be erased is written down first and struck off piece by piece, so that whoever resumes finds what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from code_worker.data.kept import open_kept
from code_worker.data.leftovers import Leftovers
from code_worker.errors import StoreError
from code_worker.logs import get_logger
from code_worker.releases.artifacts import open_artifacts
from code_worker.roles import Role, require
from code_worker.store import audit, erasing, erasures, releases, workers
from code_worker.store.erasing import Scope
from code_worker.store.erasures import IMAGE, JOB, TENANT, WAITING, Receipt
from code_worker.store.ids import uuid7
from code_worker.store.purging import purge

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store

__all__ = ["Eraser", "Preview", "Scope"]

log = get_logger(__name__)
_ROLE: Final = "erasure"
_ALL: Final = "*"
"""Stands on a receipt for all releases, where their files are to be left."""
_LEASE_S: Final = 300.0
_PAGE: Final = 500
_POLL_S: Final = 0.2
Say = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Preview:
    """What an erasure would erase.

    Attributes:
        jobs: how many.
        images: contents of which everything would go.
        shared: contents of these jobs that stay, because other jobs judged the same bytes.
        labels: how many statements.
        copies: how many kept copies.
        releases: releases that learned from one of the images, with how: `learned` or `descends`.
    """

    jobs: int
    images: int
    shared: int
    labels: int
    copies: int
    releases: Mapping[str, str] = field(default_factory=dict)


class _BusyError(StoreError):
    """Workers are judging some of it; the rest is erased."""


def _unheard(_done: int) -> None:
    """Nobody listens."""


class Eraser:
    """Erases, one process of the deployment at a time.

    Args:
        settings: where everything is kept.
        store: a migrated one.
        wait_s: how long to wait for workers that are judging what is to be erased.
    """

    def __init__(self, settings: Settings, store: Store, *, wait_s: float = 60.0) -> None:
        self._store = store
        self._roles = settings.roles
        self._wait_s = wait_s
        self._kept = open_kept(settings)
        self._artifacts = open_artifacts(settings)
        self._leftovers = Leftovers(settings, store)
        self._owner = f"eraser-{uuid7()}"

    def preview(self, scope: Scope) -> Preview:
        """What `erase` would do; writes nothing."""
        jobs: set[str] = set()
        images: set[str] = set()
        for ids, hashes in self._found(scope):
            jobs.update(ids)
            images.update(hashes)
        others = self._read(partial(erasing.judged_for, hashes=images))
        shared = {sha256 for sha256, job in others if job not in jobs}
        goes = images - shared
        said, copies = self._read(partial(erasing.counted, job_ids=jobs, hashes=goes))
        _, learned = self._concerned(goes)
        _, made = self._read(partial(erasing.learned_from, snapshot_ids=learned))
        return Preview(len(jobs), len(goes), len(shared), said, copies, made)

    def erase(
        self, scope: Scope, *, by: str, why: str = "", keep_releases: bool = False, say: Say = _unheard
    ) -> Receipt:
        """Erases what is in scope, and before it what earlier erasures left; returns the receipt.

        Args:
            scope: what to forget.
            by: who asks for it.
            why: the reason, for the receipt.
            keep_releases: leave the files of releases that learned from it; the receipt names them all the same.
            say: hears how many jobs and images are done.

        Raises:
            NotAllowedError: they are no operator; nothing was done.
            StoreError: somebody else is erasing, or workers are still judging some of it: do the same again.
            StorageError, ArtifactError: a copy or release cannot be deleted; likewise.
        """
        require(self._roles, by, Role.OPERATOR, "erase")
        with self._turn():
            erasure_id, salt = uuid7(), erasures.new_salt()

            def begin(session: Session) -> None:
                erasures.begin(session, id=erasure_id, scope=str(scope), by=by, why=why, salt=salt)
                if keep_releases:
                    erasures.note(session, erasure_id, releases={_ALL: {"how": "any", "files": "kept"}})
                audit.record(session, actor=by, action="erasure.begin", subject=erasure_id)

            self._store.run(begin)
            self._collect(erasure_id, scope)
            for receipt in self._read(erasures.still_open):
                self._finish(receipt, say)
            self.settle()
            return self._receipt(erasure_id)

    def resume(self) -> int:
        """Finishes what earlier erasures left; returns how many were finished.

        Raises:
            StoreError, StorageError, ArtifactError: see `erase`.
        """
        left = self._read(erasures.still_open)
        if left:
            with self._turn():
                for receipt in self._read(erasures.still_open):
                    self._finish(receipt, _unheard)
        self.settle()
        return len(left)

    def settle(self) -> None:
        """Deletes files of releases that learned from what was erased, once no alias points to them."""
        for receipt in self._read(erasures.list_receipts):
            waiting = [name for name, facts in receipt.releases.items() if facts["files"] == WAITING]
            if done := {name: {"how": "learned", "files": "deleted"} for name in waiting if self._retire(name)}:
                self._store.run(partial(erasures.note, erasure_id=receipt.id, releases=done))
                log.info("erasure_settled", erasure=receipt.id, releases=sorted(done))

    def _retire(self, release: str) -> bool:
        status = "its files were deleted: it learned from what was erased"
        if not self._store.run(partial(releases.retire, release_id=release, status=status)):
            return False
        self._artifacts.drop(release)
        return True

    def _read(self, work: Callable[[Session], Any]) -> Any:
        return self._store.run(work, write=False)

    def _receipt(self, erasure_id: str) -> Receipt:
        found: Receipt | None = self._read(partial(erasures.get, erasure_id=erasure_id))
        if found is None:
            raise StoreError(f"no erasure {erasure_id}")
        return found

    def _turn(self) -> _Turn:
        return _Turn(self._store, self._owner)

    def _found(self, scope: Scope) -> Iterator[tuple[list[str], set[str]]]:
        """Jobs and images in scope, page by page."""
        if scope.sha256 is not None:
            yield [], {scope.sha256}
        after: str | None = None
        while ids := self._read(partial(erasing.job_page, scope=scope, after=after, limit=_PAGE)):
            # An image named by its hash is meant; what else its jobs judged in other revisions is not.
            images = set() if scope.sha256 else self._read(partial(erasing.images_of, job_ids=ids))
            yield ids, images
            after = ids[-1]
        if (before := scope.before) is not None:
            last = ""
            while hashes := self._read(partial(erasing.spoken_of, before=before, after=last, limit=_PAGE)):
                yield [], set(hashes)
                last = hashes[-1]

    def _collect(self, erasure_id: str, scope: Scope) -> None:
        """Writes down what is to be erased, with the digests that the receipt keeps of it."""
        for ids, hashes in self._found(scope):

            def add(session: Session, ids: Sequence[str] = ids, hashes: set[str] = hashes) -> None:
                erasures.add_targets(session, erasure_id, JOB, ids)
                erasures.add_targets(session, erasure_id, IMAGE, hashes)

            self._store.run(add)
        if (tenant := scope.tenant) is not None:
            self._store.run(lambda session: erasures.add_targets(session, erasure_id, TENANT, [tenant]))
        if scope.sha256 is None:
            self._spare_shared(erasure_id)

    def _spare_shared(self, erasure_id: str) -> None:
        """Images that a job out of scope judged too stay."""
        for hashes in self._pages(erasure_id, IMAGE):

            def spare(session: Session, hashes: list[str] = hashes) -> None:
                judged = erasing.judged_for(session, hashes)
                mine = erasures.targeted(session, erasure_id, JOB, {job for _, job in judged})
                shared = {sha256 for sha256, job in judged if job not in mine}
                erasures.drop_targets(session, erasure_id, IMAGE, shared, spared=True)
                erasures.note(session, erasure_id, counts={"images_shared": len(shared)})

            self._store.run(spare)

    def _pages(self, erasure_id: str, kind: str) -> Iterator[list[str]]:
        after = ""
        while found := self._read(
            partial(erasures.targets, erasure_id=erasure_id, kind=kind, after=after, limit=_PAGE)
        ):
            yield found
            after = found[-1]
            self._renew()

    def _finish(self, receipt: Receipt, say: Say) -> None:
        """From wherever an earlier attempt ended; each step may be done again."""
        self._erase_jobs(receipt, say)
        hashes = {sha256 for page in self._pages(receipt.id, IMAGE) for sha256 in page}
        self._forget_learning(receipt, hashes)
        for page in self._pages(receipt.id, IMAGE):
            copies = sum(self._kept.drop(sha256) for sha256 in page)
            self._store.run(partial(self._erase_images, receipt=receipt, hashes=page, copies=copies))
            say(len(page))
        self._leftovers.tidy(wait_s=self._wait_s)
        purge(self._store)

        def close(session: Session) -> None:
            erasures.finish(session, receipt.id)
            done = erasures.get(session, receipt.id)
            counts = {} if done is None else dict(done.counts)
            audit.record(session, actor=receipt.by, action="erasure.done", subject=receipt.id, details=counts)

        self._store.run(close)
        # The notes of what was to be erased were rows as well.
        purge(self._store)
        log.info("erased", erasure=receipt.id, **self._receipt(receipt.id).counts)

    def _erase_jobs(self, receipt: Receipt, say: Say) -> None:
        deadline = time.monotonic() + self._wait_s
        while True:
            busy = 0
            for page in self._pages(receipt.id, JOB):
                left = self._store.run(partial(self._erase_some, receipt=receipt, ids=page))
                say(len(page) - len(left))
                busy += len(left)
            if not busy:
                return
            if time.monotonic() > deadline:
                raise _BusyError(f"{busy} of the jobs are being judged right now: do the same again in a minute")
            time.sleep(_POLL_S)

    def _erase_some(self, session: Session, *, receipt: Receipt, ids: list[str]) -> list[str]:
        entry = self._entry(session, receipt, {"jobs": len(ids)})
        counts, busy = erasing.erase_jobs(session, ids, entry)
        erasures.drop_targets(session, receipt.id, JOB, set(ids) - set(busy))
        erasures.note(session, receipt.id, counts=counts)
        return busy

    def _erase_images(self, session: Session, *, receipt: Receipt, hashes: list[str], copies: int) -> None:
        counts = erasing.erase_images(session, hashes, self._entry(session, receipt, {"images": len(hashes)}))
        erasures.drop_targets(session, receipt.id, IMAGE, hashes)
        erasures.note(session, receipt.id, counts={**counts, "images": len(hashes), "copies": copies})

    @staticmethod
    def _entry(session: Session, receipt: Receipt, details: Mapping[str, int]) -> audit.Entry:
        return audit.record(
            session, actor=receipt.by, action="erasure.remove", subject=receipt.id, details=dict(details)
        )

    def _forget_learning(self, receipt: Receipt, hashes: set[str]) -> None:
        """Out of snapshots and runs; a run under way that learns from it ends.

        Noted first, forgotten then: once a snapshot has forgotten, nothing tells any more which release learned.
        """
        if not hashes:
            return
        concerned = self._note_learning(receipt, hashes)
        for snapshot in concerned:
            self._store.run(
                partial(
                    erasing.forget_in_snapshot,
                    snapshot_id=snapshot,
                    hashes=hashes,
                    actor=receipt.by,
                    subject=receipt.id,
                )
            )
            self._renew()
        why = "an image that it learned from was erased: begin another run"
        for run in self._receipt(receipt.id).runs:
            self._store.run(partial(erasing.end_run, run_id=run, reason=why))
        self._store.run(partial(erasing.forget_in_runs, hashes=hashes))

    def _note_learning(self, receipt: Receipt, hashes: set[str]) -> set[str]:
        """Notes runs and releases on the receipt; returns the snapshots that have one of the images."""
        touched, learned = self._concerned(hashes)
        runs, _ = self._read(partial(erasing.learned_from, snapshot_ids=touched))
        _, made = self._read(partial(erasing.learned_from, snapshot_ids=learned))
        files = "kept" if _ALL in receipt.releases else WAITING
        named = {
            name: {"how": how, "files": files if how == "learned" else "kept"}
            for name, how in made.items()
            if name not in receipt.releases
        }
        counts = {"snapshots": len(touched), "runs": len(set(runs) - set(receipt.runs)), "releases": len(named)}
        self._store.run(partial(erasures.note, erasure_id=receipt.id, counts=counts, releases=named, runs=runs))
        return touched

    def _concerned(self, hashes: set[str]) -> tuple[set[str], set[str]]:
        """Snapshots that have one of these images, and those of them that have one to learn from."""
        found = self._read(partial(erasing.snapshots_with, hashes=hashes))
        learned = {snapshot for snapshot, parts in found.items() if set(parts.values()) != {"holdout"}}
        return set(found), learned

    def _renew(self) -> None:
        if not self._store.run(partial(workers.take_lease, name=_ROLE, owner=self._owner, ttl_s=_LEASE_S)):
            raise StoreError("another process took over the erasure: it goes on there")


class _Turn:
    """The role of the one who erases, for as long as a block lasts."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self._owner = owner

    def __enter__(self) -> None:
        if not self._store.run(partial(workers.take_lease, name=_ROLE, owner=self._owner, ttl_s=_LEASE_S)):
            raise StoreError("another process is erasing: wait until it is done")

    def __exit__(self, *_: object) -> None:
        self._store.run(partial(workers.drop_lease, name=_ROLE, owner=self._owner))
