"""Files of copies whose rows are gone: who deletes them, and who must not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import delete

from code_worker.data.erasure.leftovers import drop_copies
from code_worker.data.kept_copies import LocalKept
from code_worker.errors import StoreError
from code_worker.store import leases, workers
from code_worker.store.engine import Store
from code_worker.store.learning import kept_images
from code_worker.store.leases import RoleTakenError
from code_worker.store.models import LeaseRow


class Waiting(LocalKept):
    """Stops before its first deletion until it may go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.entered, self.may = threading.Event(), threading.Event()

    def drop(self, sha256: str) -> bool:
        self.entered.set()
        assert self.may.wait(30)
        return super().drop(sha256)


def test_files_of_dropped_copies_are_deleted_by_one_process_at_a_time(sqlite_store: Store, tmp_path: Path) -> None:
    """A second list of them, read before, would take what was kept anew since."""
    slow, kept = Waiting(tmp_path), LocalKept(tmp_path)
    sha256 = kept.put(b"an image")
    sqlite_store.run(lambda session: kept_images.to_drop(session, [sha256]))
    first = threading.Thread(target=drop_copies, args=(sqlite_store, slow))
    first.start()
    assert slow.entered.wait(30)
    with pytest.raises(RoleTakenError, match="another process is deleting files of copies"):
        drop_copies(sqlite_store, kept)
    assert kept.exists(sha256)
    second = threading.Thread(target=drop_copies, args=(sqlite_store, kept), kwargs={"wait_s": 30})
    second.start()
    slow.may.set()
    first.join()
    second.join()
    assert not kept.exists(sha256)
    assert sqlite_store.run(lambda session: kept_images.copies_to_drop(session, limit=1), write=False) == []
    kept.put(b"an image")
    assert drop_copies(sqlite_store, kept) == 0
    assert kept.exists(sha256)


@pytest.mark.parametrize("done", [False, True], ids=["another is at it", "another was at it"])
def test_a_process_that_slept_deletes_no_file_after_another_took_over(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    slow = Waiting(tmp_path)
    hashes = sorted(slow.put(data) for data in (b"one", b"two"))
    sqlite_store.run(lambda session: kept_images.to_drop(session, hashes))
    found: list[BaseException] = []

    def drop() -> None:
        try:
            drop_copies(sqlite_store, slow)
        except StoreError as error:
            found.append(error)

    sleeper = threading.Thread(target=drop)
    sleeper.start()
    assert slow.entered.wait(30)
    # As if it had slept for longer than a lease: another process took the role, and perhaps gave it back since.
    monkeypatch.setattr(leases, "LEASE_S", 0.0)
    sqlite_store.run(lambda session: session.execute(delete(LeaseRow)))
    assert done or sqlite_store.run(lambda session: workers.take_lease(session, "copies", "another", 60.0))
    slow.may.set()
    sleeper.join()
    assert [type(error) for error in found] == [leases.RoleLostError]
    assert [slow.exists(sha256) for sha256 in hashes] == [False, True]
