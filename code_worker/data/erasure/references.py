"""References to what is erased: rows of others, and what was learned from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from code_worker.errors import ArtifactError, StoreError
from code_worker.logs import get_logger
from code_worker.releases.manifest import parse_manifest
from code_worker.store import releases
from code_worker.store.erasure import dead_letters, personal, receipts, rows
from code_worker.store.erasure.receipts import WAITING, Receipt

if TYPE_CHECKING:
    from code_worker.releases.artifacts import ArtifactStore
    from code_worker.store.engine import Session, Store
    from code_worker.store.erasure.scopes import Scope
    from code_worker.store.leases import RoleLease

_SCANNED: Final = 5000
"""Rows of a table that is read through, in one transaction."""
_LETTERS: Final = 4
"""Messages of 64 KiB, each of thousands of words that may be an address, read in one transaction."""


class Mentions:
    """Takes out what names something erased, while the lease is this process's; all of it may be done again."""

    def __init__(self, store: Store, lease: RoleLease) -> None:
        self._store = store
        self._lease = lease

    def _read(self, work: Callable[[Session], Any]) -> Any:
        return self._store.run(work, write=False)

    def erase_addresses(self, receipt: Receipt) -> int:
        """Takes addresses of erased jobs out of labels and notes on copies; returns how many named one."""
        if not self._read(partial(receipts.targets, erasure_id=receipt.id, kind=receipts.URI, limit=1)):
            return 0
        count = 0
        after: str | None = ""
        while after is not None:
            some, after = self._lease.write(partial(self._labels, receipt=receipt, after=after))
            count += some
        last: str | None = ""
        while last is not None:
            work = partial(rows.erase_copy_addresses, erasure_id=receipt.id, limit=_SCANNED)
            some, last = self._lease.write(partial(work, after=last))
            count += some
        return count

    @staticmethod
    def _labels(session: Session, *, receipt: Receipt, after: str) -> tuple[int, str | None]:
        page = partial(rows.erase_addresses, after=after, limit=_SCANNED, actor=receipt.by)
        done, following = page(session, receipt.id)
        receipts.count(session, receipt.id, done.counts)
        return done.counts["addresses"], following

    def is_named(self, kind: str, value: str) -> bool:
        """Returns whether an unreadable message or, of an image, a snapshot of the labelled ones names it."""
        if kind == receipts.IMAGE and self._read(partial(rows.snapshots_with, hashes={value})):
            return True
        after: str | None = ""
        while after is not None:
            page = partial(dead_letters.is_named, kind=kind, value=value, after=after, limit=_LETTERS)
            found, after = self._read(page)
            if found:
                return True
        return False

    def erase_letters(self, receipt: Receipt, scope: Scope) -> int:
        """Takes what was erased out of unreadable messages.

        Returns:
            How many named something, of those that were there when the erasure was asked for: messages of a tenant
            that goes on sending them have no end.
        """
        # A process that is writing one is done after this, and it is read.
        self._lease.write(personal.keep_out)
        count = 0
        after: str | None = ""
        while after is not None:
            page = partial(dead_letters.naming, erasure_id=receipt.id, scope=scope, after=after, limit=_LETTERS)
            # Read outside of the transaction that rewrites: reading
            # takes seconds, and a letter that changed meanwhile is left.
            found, after = self._read(page)
            if found:
                self._lease.write(partial(self._rewrite, erasure_id=receipt.id, found=found))
            count += sum(scope.until is None or one.at <= scope.until for one in found)
        return count

    @staticmethod
    def _rewrite(session: Session, *, erasure_id: str, found: list[dead_letters.Naming]) -> None:
        receipts.count(session, erasure_id, {"dead_letters": dead_letters.rewrite(session, found)})


log = get_logger(__name__)

ALL: Final = "*"
"""Stands on a receipt for all releases, where their files are to be left."""


class Unlearning:
    """The steps of an erasure that concern learning, while this process holds the lease."""

    def __init__(self, store: Store, lease: RoleLease) -> None:
        self._store = store
        self._lease = lease

    def _read(self, work: Callable[[Session], Any]) -> Any:
        return self._store.run(work, write=False)

    def forget(self, receipt: Receipt, hashes: set[str]) -> None:
        """Out of snapshots and runs; a run under way that learns from it ends.

        Runs end first, so that none registers another release while those that there are are noted; and these are
        noted before snapshots forget: from then on nothing tells any more which release learned.
        """
        if not hashes:
            return
        touched, learned = self._concerned(hashes)
        self._end_runs(receipt.id, touched)
        self._note_releases(receipt.id, learned)
        for snapshot in touched:
            self._lease.write(partial(self._forget_in, receipt=receipt, snapshot=snapshot, hashes=hashes))
        self._lease.write(partial(rows.forget_in_runs, hashes=hashes))

    @staticmethod
    def _forget_in(session: Session, *, receipt: Receipt, snapshot: str, hashes: set[str]) -> None:
        forgot = rows.forget_in_snapshot(session, snapshot, hashes, actor=receipt.by, subject=receipt.id)
        receipts.count(session, receipt.id, {"snapshots": int(forgot)})

    def _end_runs(self, erasure_id: str, touched: set[str]) -> None:
        """Notes runs on the receipt and ends them: from then on none of them registers a release."""
        runs = self._read(partial(rows.runs_on, snapshot_ids=touched))

        def note(session: Session) -> list[str]:
            known = _noted(session, erasure_id).runs
            receipts.note(session, erasure_id, counts={"runs": len(set(runs) - set(known))}, runs=runs)
            return sorted({*known, *runs})

        why = "an image that it learned from was erased: begin another run"
        # Noted before they end: who takes up this erasure after a crash finds them on the receipt, and ends them.
        for run in self._lease.write(note):
            self._lease.write(partial(rows.end_run, run_id=run, reason=why))

    def _note_releases(self, erasure_id: str, learned: set[str]) -> None:
        made = self._read(partial(rows.learned_from, snapshot_ids=learned))

        def note(session: Session) -> None:
            known = _noted(session, erasure_id).releases
            files = "kept" if ALL in known else WAITING
            # What an earlier attempt noted stays as it says: files that are deleted must not be awaited again.
            named = {
                name: {"how": how, "files": files if how == "learned" else "kept"}
                for name, how in made.items()
                if name not in known
            }
            receipts.note(session, erasure_id, counts={"releases": len(named)}, releases=named)

        self._lease.write(note)

    def made_from(self, hashes: set[str]) -> Mapping[str, str]:
        """Releases that learned from one of the images, with how: `learned` or `descends`."""
        _, learned = self._concerned(hashes)
        made: Mapping[str, str] = self._read(partial(rows.learned_from, snapshot_ids=learned))
        return made

    def _concerned(self, hashes: set[str]) -> tuple[set[str], set[str]]:
        """Snapshots that have one of these images, and those of them that have one to learn from."""
        found: Mapping[str, Mapping[str, str]] = self._read(partial(rows.snapshots_with, hashes=hashes))
        learned = {snapshot for snapshot, parts in found.items() if set(parts.values()) != {"holdout"}}
        return set(found), learned


def drop_forgotten(store: Store, artifacts: ArtifactStore) -> int:
    """Deletes files of releases that an erasure has deleted and somebody put back, or a run that it ended stored.

    The process of such a run died before it registered what it stored, or deleted it.

    Returns:
        How many releases there were.

    Raises:
        ArtifactError: they cannot be listed, read or deleted; the next call goes on there.
    """
    deleted, ended = store.run(_erased, write=False)
    if not deleted and not ended:
        return 0
    there = set(artifacts.list())
    # Read after the list: a process that registers one of these meanwhile has its row by then, or is refused.
    unknown = there - store.run(releases.registered, write=False) if ended else set()
    sources = {release: _source(artifacts, release) for release in sorted(unknown)}
    ours = store.run(partial(rows.unregistered, sources=sources), write=False) if sources else set()
    dropped = sum(artifacts.drop(release) for release in sorted(ours | deleted & there))
    if dropped:
        log.info("erased_releases_deleted", count=dropped)
    return dropped


def _erased(session: Session) -> tuple[set[str], bool]:
    """Releases whose files erasures have deleted, and whether receipts name any run."""
    found = list(receipts.learned(session))
    named = ((name, facts["files"]) for receipt in found for name, facts in receipt.releases.items())
    return {name for name, files in named if files == "deleted"}, any(receipt.runs for receipt in found)


def _source(artifacts: ArtifactStore, release: str) -> str:
    content = artifacts.manifest(release)
    try:
        return "" if content is None else parse_manifest(content, release).source.uri
    except ArtifactError:
        # Damaged, or of another version: it says nothing of its making, and keeps nobody from the others.
        return ""


def _noted(session: Session, erasure_id: str) -> Receipt:
    """The receipt, in the transaction that adds to it: repeated after a lost answer, it adds nothing twice."""
    found = receipts.get(session, erasure_id, lock=True)
    if found is None:
        raise StoreError(f"no erasure {erasure_id}")
    return found
