"""Remains of erased images and runs in this machine's data directory, erased here or from elsewhere."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker.data.kept_copies import KeptImages, LocalKept
from code_worker.errors import StorageError
from code_worker.logs import get_logger
from code_worker.releases.artifacts import LocalArtifacts
from code_worker.store.erasure import receipts
from code_worker.store.ids import uuid7
from code_worker.store.learning import kept_images
from code_worker.store.leases import RoleLease, RoleTakenError
from code_worker.system.files import locked
from code_worker.wire import chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store

    Note = Callable[[Session, int], object]


log = get_logger(__name__)
_ROLE: Final = "copies"
_LOCK: Final = "lock"
_PAGE: Final = 1000
_DROPPED: Final = 100
_POLL_S: Final = 0.2
_FRESH_S: Final = 600.0


class Leftovers:
    """Directories of runs that learned from erased images, cached copies of images and releases that are gone.

    Receipts name the runs and releases, and rows the images of which copies are kept, so any machine can tidy itself
    without being told what was erased.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._data = settings.data_path
        self._store = store

    def tidy(self, *, wait_s: float = 0.0) -> int:
        """Deletes them and returns how many there were; with `wait_s`, a process at work in one is waited for.

        Raises:
            StorageError: one cannot be deleted, or its process did not leave it in time.
        """
        try:
            runs, releases = self._named(_names(self._data / "runs"), _names(self._data / "cache" / "releases"))
            found = self._runs(runs, wait_s) + self._copies() + self._releases(releases)
        except OSError as error:
            raise StorageError(f"cannot tidy {self._data}: {error}") from error
        if found:
            log.info("leftovers_deleted", count=found)
        return found

    def _named(self, runs: set[str], releases: set[str]) -> tuple[list[str], set[str]]:
        """Those of these runs and releases, which are here, that receipts name."""
        # Most machines have neither: they spare the ledger the question.
        if not runs and not releases:
            return [], set()

        def look(session: Session) -> tuple[list[str], set[str]]:
            named, deleted = set[str](), set[str]()
            for one in receipts.learned(session):
                named |= runs.intersection(one.runs)
                deleted |= {
                    name for name, facts in one.releases.items() if name in releases and facts["files"] == "deleted"
                }
            return sorted(named), deleted

        return self._store.run(look, write=False)

    def _runs(self, runs: Iterable[str], wait_s: float) -> int:
        places = [place for run in runs if (place := self._data / "runs" / run).is_dir()]
        deadline = time.monotonic() + wait_s
        count = 0
        for place in places:
            while not (gone := _remove(place)) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            if not gone and wait_s:
                raise StorageError(f"a training process still works in {place}: end it and do the same again")
            count += gone
        return count

    def _copies(self) -> int:
        """Cached copies of images of which no copy is kept; a fresh one may be of an image not noted yet."""
        cache = LocalKept(self._data / "cache" / "dataset")
        count = 0
        for some in chunks(cache.held(), _PAGE):

            def known(session: Session, some: list[str] = some) -> set[str]:
                return set(kept_images.kept(session, some))

            kept = self._store.run(known, write=False)
            old = [sha256 for sha256 in some if sha256 not in kept and _age_s(cache.place(sha256)) > _FRESH_S]
            count += sum(cache.drop(sha256) for sha256 in old)
        return count

    def _releases(self, releases: set[str]) -> int:
        cache = self._data / "cache" / "releases"
        return sum(LocalArtifacts(cache).drop(name) for name in releases if (cache / name).is_dir())


def drop_copies(store: Store, kept: KeptImages, *, wait_s: float = 0.0, note: Note | None = None) -> int:
    """Deletes the files of copies whose rows are gone, one process of the deployment at a time.

    Another one could delete by a list that it read earlier a copy that was kept anew since.

    Args:
        store: a migrated one.
        kept: the dataset storage.
        wait_s: how long to wait for a process that is deleting them.
        note: hears how many files went, in the transaction after which that is known.

    Returns:
        How many there were.

    Raises:
        StorageError: one cannot be deleted; the next call goes on there.
        RoleTakenError: another process is still at it.
    """
    deadline, count = time.monotonic() + wait_s, 0
    while _to_drop(store, limit=1):
        try:
            with RoleLease(
                store, _ROLE, f"copies-{uuid7()}", doing="deleting files of copies", wait_s=wait_s
            ) as lease:
                while hashes := _to_drop(store, limit=_DROPPED):
                    gone = 0
                    for sha256 in hashes:
                        # No transaction fences the deletion of a file: the role is looked at as late as may be.
                        lease.check()
                        gone += kept.drop(sha256)
                    # After the files: who dies in between leaves rows that
                    # lead to nothing, and the next one deletes nothing again.
                    lease.write(partial(_dropped, hashes=hashes, gone=gone, note=note))
                    count += gone
        except RoleTakenError:
            if time.monotonic() >= deadline:
                raise
    return count


def _dropped(session: Session, *, hashes: list[str], gone: int, note: Note | None) -> None:
    if kept_images.dropped(session, hashes) and note is not None:
        note(session, gone)


def _to_drop(store: Store, *, limit: int) -> list[str]:
    return store.run(partial(kept_images.copies_to_drop, limit=limit), write=False)


def _names(place: Path) -> set[str]:
    with suppress(FileNotFoundError):
        return {path.name for path in place.iterdir() if path.is_dir()}
    return set()


def _age_s(path: Path) -> float:
    with suppress(FileNotFoundError):
        # The file is in this machine's own cache, so the same clock dated it.
        return time.time() - path.stat().st_mtime
    return 0.0


def _remove(place: Path) -> bool:
    """Deletes the directory of a run, unless a process works in it."""
    try:
        # A process holds this lock for as long as it works in the directory, and the system frees it when it dies.
        with locked(place / _LOCK, create=False):
            shutil.rmtree(place)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        shutil.rmtree(place)
    return True
