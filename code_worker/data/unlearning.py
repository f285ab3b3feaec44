"""Erased images out of what was learned from them: snapshots, runs, and the releases that must be named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from code_worker.store import erasing, erasures
from code_worker.store.erasures import WAITING, Receipt

if TYPE_CHECKING:
    from code_worker.store.engine import Session, Store
    from code_worker.store.turns import Turn

__all__ = ["ALL", "Unlearning"]

ALL: Final = "*"
"""Stands on a receipt for all releases, where their files are to be left."""


class Unlearning:
    """What an erasure does about learning, while the turn is this process's."""

    def __init__(self, store: Store, turn: Turn) -> None:
        self._store = store
        self._turn = turn

    def _read(self, work: Callable[[Session], Any]) -> Any:
        return self._store.run(work, write=False)

    def forget(self, receipt: Receipt, hashes: set[str]) -> None:
        """Out of snapshots and runs; a run under way that learns from it ends.

        Noted first, forgotten then: once a snapshot has forgotten, nothing tells any more which release learned.
        """
        if not hashes:
            return
        concerned = self._note_learning(receipt, hashes)
        for snapshot in concerned:
            self._turn.write(partial(self._forget_in, receipt=receipt, snapshot=snapshot, hashes=hashes))
        why = "an image that it learned from was erased: begin another run"
        noted = self._read(partial(erasures.get, erasure_id=receipt.id))
        for run in () if noted is None else noted.runs:
            self._turn.write(partial(erasing.end_run, run_id=run, reason=why))
        self._turn.write(partial(erasing.forget_in_runs, hashes=hashes))

    @staticmethod
    def _forget_in(session: Session, *, receipt: Receipt, snapshot: str, hashes: set[str]) -> None:
        forgot = erasing.forget_in_snapshot(session, snapshot, hashes, actor=receipt.by, subject=receipt.id)
        erasures.count(session, receipt.id, {"snapshots": int(forgot)})

    def _note_learning(self, receipt: Receipt, hashes: set[str]) -> set[str]:
        """Notes runs and releases on the receipt; returns the snapshots that have one of the images."""
        touched, learned = self._concerned(hashes)
        runs, _ = self._read(partial(erasing.learned_from, snapshot_ids=touched))
        _, made = self._read(partial(erasing.learned_from, snapshot_ids=learned))

        def note(session: Session) -> None:
            known = erasures.get(session, receipt.id, lock=True) or receipt
            files = "kept" if ALL in known.releases else WAITING
            named = {
                name: {"how": how, "files": files if how == "learned" else "kept"}
                for name, how in made.items()
                if name not in known.releases
            }
            counts = {"runs": len(set(runs) - set(known.runs)), "releases": len(named)}
            erasures.note(session, receipt.id, counts=counts, releases=named, runs=runs)

        self._turn.write(note)
        return touched

    def made_from(self, hashes: set[str]) -> Mapping[str, str]:
        """Releases that learned from one of the images, with how: `learned` or `descends`."""
        _, learned = self._concerned(hashes)
        made: Mapping[str, str]
        _, made = self._read(partial(erasing.learned_from, snapshot_ids=learned))
        return made

    def _concerned(self, hashes: set[str]) -> tuple[set[str], set[str]]:
        """Snapshots that have one of these images, and those of them that have one to learn from."""
        found: Mapping[str, Mapping[str, str]] = self._read(partial(erasing.snapshots_with, hashes=hashes))
        learned = {snapshot for snapshot, parts in found.items() if set(parts.values()) != {"holdout"}}
        return set(found), learned
