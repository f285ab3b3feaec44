"""Erasure: everything that is kept of jobs and images goes, even if processes die on the way, and a receipt stays.

The erasure is a row with its scope. A process that takes it up, in any state, deletes what is in scope
now, spares what others share, and looks over all tables and the storage before it is called done.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from code_worker.data.erasure.leftovers import Leftovers, drop_copies
from code_worker.data.erasure.references import ALL, Mentions, Unlearning, drop_forgotten
from code_worker.data.kept_copies import open_kept
from code_worker.errors import ArtifactError, StorageError, StoreError, StoreUnavailableError
from code_worker.logs import get_logger
from code_worker.releases.artifacts import open_artifacts
from code_worker.roles import Role, require
from code_worker.store import audit, releases, workers
from code_worker.store.erasure import personal, receipts, scopes
from code_worker.store.erasure import rows as erasing
from code_worker.store.erasure.receipts import ERASED, IMAGE, JOB, WAITING, Receipt
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import uuid7
from code_worker.store.learning import kept_images
from code_worker.store.leases import RoleLease, RoleLostError
from code_worker.store.paging import pages, steps
from code_worker.store.retention import purge

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store

log = get_logger(__name__)
T = TypeVar("T")
_ROLE: Final = "erasure"
_PAGE: Final = 500
_POLL_S: Final = 0.5
_LOOKS: Final = 20
Say = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Preview:
    """Counts of what an erasure would erase.

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
        self._lease = RoleLease(store, _ROLE, f"eraser-{uuid7()}", doing="erasing", wait_s=wait_s)
        self._unlearning = Unlearning(store, self._lease)
        self._mentions = Mentions(store, self._lease)

    def preview(self, scope: Scope) -> Preview:
        """Returns what `erase` would do; writes nothing.

        Raises:
            StoreError: nothing is kept of the job, image or tenant, and nothing was ever erased of it.
        """
        jobs, images = set[str](), {scope.sha256} if scope.sha256 is not None else set[str]()
        self.erased_before(scope)
        for ids in self._jobs_of(scope):
            jobs.update(ids)
            # An image named by its hash is meant; what else its jobs judged in other revisions is not.
            images |= set() if scope.sha256 else self._read(partial(scopes.images_of, job_ids=ids))
        images |= {sha256 for sha256, _ in self._read(partial(scopes.origin_page, scope=scope, limit=None))}
        for hashes in self._spoken_of(scope):
            images.update(hashes)
        shared = self._read(partial(scopes.shared, scope=scope, hashes=images))
        goes = images - shared
        said, copies = self._read(partial(erasing.counted, job_ids=jobs, hashes=goes))
        return Preview(len(jobs), len(goes), len(shared), said, copies, self._unlearning.made_from(goes))

    def erased_before(self, scope: Scope) -> Receipt | None:
        """The finished erasure after which nothing is left of a job, image or tenant; None where something is kept.

        Raises:
            StoreError: nothing is kept of it, and nothing was ever erased of it.
        """
        if self._read(partial(scopes.is_known, scope=scope)) or self._mentions.is_named(*scope.named):
            return None
        if scope.sha256 is not None and self._kept.exists(scope.sha256):
            return None
        before: Receipt = self._read(partial(scopes.erased_before, scope=scope))
        return before if before.state == "done" else None

    def erase(
        self, scope: Scope, *, by: str, why: str = "", keep_releases: bool = False, say: Say = lambda _done: None
    ) -> Receipt:
        """Erases what is in scope, and before it what earlier erasures left; returns the receipt.

        What is accepted later is not in scope. An unfinished erasure of the same is asked for anew and finished; one
        that left nothing is not begun again: its receipt is returned.

        Args:
            scope: what to forget.
            by: who asks for it.
            why: the reason, for the receipt.
            keep_releases: leave the files of releases that learned from it; the receipt names them all the same.
            say: hears how many jobs and images are done.

        Raises:
            NotAllowedError: they are no operator; nothing was done.
            StoreError: nothing is kept of the job, image or tenant nor was anything erased, and nothing was done; or
                somebody else is erasing, or workers are still judging some of it: do the same again.
            StorageError, ArtifactError: a copy or release cannot be deleted; do the same again.
        """
        require(self._roles, by, Role.OPERATOR, "erase")
        if (before := self.erased_before(scope)) is not None:
            return before
        with self._lease:
            erasure_id = self._open(scope, by=by, why=why, keep_releases=keep_releases)
            self._finish_all(say)
            self.settle()
            return self._receipt(erasure_id)

    def resume(self) -> int:
        """Finishes what earlier erasures left; returns how many were finished.

        Raises:
            StoreError, StorageError, ArtifactError: see `erase`.
        """
        left = self._read(receipts.still_open)
        if left:
            with self._lease:
                self._finish_all(lambda _done: None)
        self.settle()
        return len(left)

    def settle(self) -> None:
        """Deletes files of releases that learned from what was erased, once no alias points to them.

        Also those that somebody put back, and what a run that an erasure ended had stored.
        """
        for receipt in self._read(lambda session: list(receipts.learned(session))):
            waiting = [name for name, facts in receipt.releases.items() if facts["files"] == WAITING]
            if done := {name: {"how": "learned", "files": "deleted"} for name in waiting if self._retire(name)}:
                self._store.run(partial(receipts.note, erasure_id=receipt.id, releases=done))
                log.info("erasure_settled", erasure=receipt.id, releases=sorted(done))
        drop_forgotten(self._store, self._artifacts)

    def _retire(self, release: str) -> bool:
        status = "its files were deleted: it learned from what was erased"
        if not self._store.run(partial(releases.retire, release_id=release, status=status)):
            return False
        self._artifacts.drop(release)
        return True

    def _read(self, work: Callable[[Session], Any]) -> Any:
        return self._store.run(work, write=False)

    def _write(self, work: Callable[[Session], T]) -> T:
        return self._lease.write(work)

    def _receipt(self, erasure_id: str) -> Receipt:
        found: Receipt | None = self._read(partial(receipts.get, erasure_id=erasure_id))
        if found is None:
            raise StoreError(f"no erasure {erasure_id}")
        return found

    def _open(self, scope: Scope, *, by: str, why: str, keep_releases: bool) -> str:
        """Begins the erasure, or finds one of the same scope that is not finished."""
        chosen, salt = uuid7(), receipts.new_salt()

        def begin(session: Session) -> str:
            if (under_way := receipts.open_with(session, scope.target())) is not None:
                receipts.ask_again(session, under_way.id)
                return under_way.id
            receipts.begin(session, id=chosen, scope=str(scope), target=scope.target(), by=by, why=why, salt=salt)
            if scope.job is not None or scope.tenant is not None:
                receipts.add_targets(session, chosen, scope.named[0], [scope.named[1]])
            if scope.sha256 is not None:
                # Nobody shares it: from here on no worker writes a verdict of it either.
                personal.keep_out(session)
                receipts.add_targets(session, chosen, IMAGE, [scope.sha256])
                receipts.mark(session, chosen, [scope.sha256])
            if keep_releases:
                receipts.note(session, chosen, releases={ALL: {"how": "any", "files": "kept"}})
            audit.record(session, actor=by, action="erasure.begin", subject=chosen)
            return chosen

        return self._write(begin)

    def _finish_all(self, say: Say) -> None:
        """Each erasure that is open; one that cannot be finished now keeps no other from it."""
        first: StoreError | StorageError | ArtifactError | None = None
        for receipt in self._read(receipts.still_open):
            try:
                self._finish(receipt, say)
            except (RoleLostError, StoreUnavailableError):
                raise
            except (StoreError, StorageError, ArtifactError) as error:
                first = first or error
        if first is not None:
            raise first

    def _finish(self, receipt: Receipt, say: Say) -> None:
        """From wherever an earlier attempt ended; each step may be done again."""
        scope = Scope.of(self._read(partial(receipts.target_of, erasure_id=receipt.id)), until=receipt.created_at)
        late = 0
        for _ in range(_LOOKS):
            busy = self._erase_rows(receipt, scope, say)
            self._leftovers.tidy(wait_s=self._wait_s)
            if busy:
                raise StoreError(f"{busy} of the jobs are being judged right now: do the same again in a minute")
            self._enter(receipt, "last look")
            if not (found := self._look(receipt, scope)).total():
                return self._close(receipt, scope, late)
            log.info("erasure_found_more", erasure=receipt.id, **found)
            late += found.total()
        raise StoreError(f"erasure {receipt.id}: what is erased is written again all the time; do the same again")

    def _erase_rows(self, receipt: Receipt, scope: Scope, say: Say) -> int:
        """All that is in scope now; returns how many jobs are left because they are being judged."""
        busy = self._erase_jobs(receipt, scope, say)
        self._erase_strays(receipt, scope)
        self._enter(receipt, "addresses")
        self._erase_addresses(receipt)
        self._write(workers.blank_pauses)
        self._enter(receipt, "images")
        for page in self._targets(receipt, IMAGE):
            self._write(partial(self._spare_shared, receipt=receipt, scope=scope, hashes=page))
        self._unlearning.forget(receipt, {sha256 for page in self._targets(receipt, IMAGE) for sha256 in page})
        for page in self._targets(receipt, IMAGE):
            self._write(partial(self._erase_images, receipt=receipt, scope=scope, hashes=page))
            say(len(page))
        self._drop_copies(receipt)
        self._erase_letters(receipt, scope)
        return busy

    def _enter(self, receipt: Receipt, step: str) -> None:
        self._write(partial(receipts.enter, erasure_id=receipt.id, step=step))

    def _pages(self, work: Callable[..., list[str]], first: str | None = "") -> Iterator[Sequence[str]]:
        """Pages of ids or content hashes, in their order."""
        return pages(lambda last: self._read(partial(work, after=last, limit=_PAGE)), lambda value: value, first)

    def _targets(self, receipt: Receipt, kind: str) -> Iterator[Sequence[str]]:
        return self._pages(partial(receipts.targets, erasure_id=receipt.id, kind=kind))

    def _jobs_of(self, scope: Scope) -> Iterator[Sequence[str]]:
        return self._pages(partial(scopes.job_page, scope=scope), None)

    def _job_pages(self, receipt: Receipt, scope: Scope) -> Iterator[Sequence[str]]:
        if scope.is_unknown:
            # Begun by a version that did not keep the scope: what it had listed is all that can be found.
            for page in self._targets(receipt, JOB):
                if there := sorted(self._write(partial(personal.left, jobs=page)).jobs):
                    yield there
            return
        yield from self._jobs_of(scope)

    def _erase_jobs(self, receipt: Receipt, scope: Scope, say: Say) -> int:
        self._enter(receipt, "jobs")
        deadline = time.monotonic() + self._wait_s
        while True:
            busy = 0
            for page in self._job_pages(receipt, scope):
                left = self._write(partial(self._erase_some, receipt=receipt, scope=scope, ids=page))
                say(len(page) - len(left))
                busy += len(left)
            if not busy or time.monotonic() > deadline:
                return busy
            time.sleep(_POLL_S)

    @staticmethod
    def _erase_some(session: Session, *, receipt: Receipt, scope: Scope, ids: Sequence[str]) -> list[str]:
        done = erasing.erase_jobs(session, receipt.id, ids, scope=scope, actor=receipt.by)
        receipts.count(session, receipt.id, done.counts)
        return done.busy

    def _erase_strays(self, receipt: Receipt, scope: Scope) -> None:
        """Erases what jobs in scope left that are gone themselves, and images that only labels name."""

        def erase(session: Session, found: list[tuple[str, str]]) -> None:
            done = erasing.erase_strays(session, receipt.id, found, scope=scope)
            receipts.count(session, receipt.id, done.counts)

        while found := self._read(partial(scopes.origin_page, scope=scope, limit=_PAGE)):
            self._write(partial(erase, found=found))
        for some in steps(lambda last: self._read(partial(scopes.stray_scores, scope=scope, after=last)), ""):
            if some:
                self._write(partial(erase, found=some))
        if scope.job is not None and (page := self._read(partial(_named_by, job_id=scope.job))):
            self._write(partial(self._erase_some, receipt=receipt, scope=scope, ids=page))
        for hashes in self._spoken_of(scope):
            self._write(partial(receipts.add_targets, erasure_id=receipt.id, kind=IMAGE, values=hashes))

    def _spoken_of(self, scope: Scope) -> Iterator[Sequence[str]]:
        return iter(()) if scope.before is None else self._pages(partial(scopes.spoken_of, before=scope.before))

    def _erase_addresses(self, receipt: Receipt) -> int:
        return self._mentions.erase_addresses(receipt)

    @staticmethod
    def _spare_shared(session: Session, *, receipt: Receipt, scope: Scope, hashes: Sequence[str]) -> None:
        stay = erasing.spare_shared(session, receipt.id, hashes, scope=scope)
        receipts.count(session, receipt.id, {"images_shared": stay})

    @staticmethod
    def _erase_images(session: Session, *, receipt: Receipt, scope: Scope, hashes: Sequence[str]) -> None:
        done = erasing.erase_images(session, receipt.id, hashes, scope=scope, actor=receipt.by)
        receipts.count(session, receipt.id, done.counts)

    def _drop_copies(self, receipt: Receipt) -> None:
        def note(session: Session, files: int) -> None:
            receipts.count(session, receipt.id, {"copies": files})

        drop_copies(self._store, self._kept, wait_s=self._wait_s, note=note)

    def _erase_letters(self, receipt: Receipt, scope: Scope) -> int:
        return self._mentions.erase_letters(receipt, scope)

    def _look(self, receipt: Receipt, scope: Scope) -> Counter[str]:
        """Looks over all tables and the storage once more; what is found is on the list again."""
        found: Counter[str] = Counter()
        look = partial(erasing.rows_left, erasure_id=receipt.id, scope=scope)
        for page in self._targets(receipt, JOB):
            if rows := self._write(partial(look, hashes=[], job_ids=page)):
                found["rows"] += rows
                self._write(partial(self._erase_some, receipt=receipt, scope=scope, ids=page))
        for page in self._targets(receipt, ERASED):
            found["rows"] += self._write(partial(look, hashes=page, job_ids=[]))
            again = [sha256 for sha256 in page if self._kept.exists(sha256)]
            self._write(partial(kept_images.to_drop, hashes=again))
            found["copies"] += len(again)
        found["jobs"] += self._read(partial(scopes.jobs_left, scope=scope))
        found["rows"] += self._erase_addresses(receipt)
        found["letters"] += self._erase_letters(receipt, scope)
        if not found.total():
            # Listed by a try of a transaction above whose answer was lost.
            found["rows"] = len(self._read(partial(receipts.targets, erasure_id=receipt.id, kind=IMAGE, limit=_PAGE)))
        return found

    def _close(self, receipt: Receipt, scope: Scope, late: int) -> None:
        purge(self._store)
        seen = {"rows": 0, "copies": 0, "jobs": 0, "letters": 0, "late": late}
        if scope.is_unknown:
            seen["scope_unknown"] = 1

        def close(session: Session) -> None:
            if not receipts.finish(session, receipt.id, seen):
                return
            done = receipts.get(session, receipt.id)
            counts = {} if done is None else dict(done.counts)
            audit.record(session, actor=receipt.by, action="erasure.done", subject=receipt.id, details=counts)

        self._write(close)
        # The notes of what was to be erased were rows as well.
        purge(self._store)
        log.info("erased", erasure=receipt.id, **self._receipt(receipt.id).counts)


def _named_by(session: Session, job_id: str) -> list[str]:
    """The job's id, if labels or scores name it though it is gone."""
    there = personal.left(session, jobs=[job_id]).jobs
    return [job_id] if not there and scopes.images_of(session, [job_id]) else []
