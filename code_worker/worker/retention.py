"""Retention in the background: one process at a time, a bounded pass now and then; and what erasures left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from code_worker.errors import ArtifactError, DatasetError, StoreError
from code_worker.logs import get_logger
from code_worker.store import retention, workers
from code_worker.store.erasure import receipts
from code_worker.store.learning import kept_images

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Store

log = get_logger(__name__)
_ROLE = "retention"
_LEASE_S = 120.0
_LABELLING_S = 3600.0
"""Longer than anybody takes from noting a copy to saying something of its image."""


class Retention:
    """Deletes what the settings say is too old; leaves off after `pass_s`, the next pass goes on.

    Args:
        settings: how long what is kept.
        store: a migrated one.
        owner: the name under which it holds its role.
    """

    def __init__(self, settings: Settings, store: Store, owner: str) -> None:
        self.interval_s = settings.retention.interval_s
        self._settings = settings
        self._store = store
        self._owner = owner
        self._stopped = threading.Event()

    def stop(self) -> None:
        """A pass under way ends after the batch at hand."""
        self._stopped.set()

    def __call__(self) -> Mapping[str, int]:
        """One pass, if nobody else is at it; rows deleted by kind. Each machine tidies its own directory."""
        # Before the turn is asked for: files of this machine are nobody else's to delete.
        self._tidy()
        if not self._take_turn(_LEASE_S):
            return {}
        try:
            self._finish_erasures()
            self._drop_copies()
            return self._pass()
        finally:
            # Others of the fleet need not look before it is due again.
            self._take_turn(self.interval_s * 0.8)

    def _tidy(self) -> None:
        from code_worker.data.erasure.leftovers import Leftovers
        from code_worker.data.erasure.references import drop_forgotten
        from code_worker.releases.artifacts import open_artifacts

        Leftovers(self._settings, self._store).tidy()
        try:
            drop_forgotten(self._store, open_artifacts(self._settings))
        except ArtifactError as error:
            log.warning("erased_releases_wait", error=str(error))

    def _finish_erasures(self) -> None:
        """Finishes erasures that a dead process left, and deletes files of releases that are not in use any more."""
        left = self._store.run(
            lambda session: bool(receipts.still_open(session) or receipts.releases_owed(session)), write=False
        )
        if left:
            from code_worker.data.erasure.erase import Eraser

            try:
                # Without waiting for workers that judge some of it: the next pass meets those jobs again.
                Eraser(self._settings, self._store, wait_s=0).resume()
            except (ArtifactError, DatasetError, StoreError) as error:
                log.warning("erasure_waits", error=str(error))

    def _drop_copies(self) -> None:
        """Files of copies that labellers or a pass before this one left when they died."""
        limit = self._settings.retention.batch
        try:
            self._store.run(lambda session: kept_images.forget_unsaid(session, older_s=_LABELLING_S, limit=limit))
            if self._store.run(lambda session: kept_images.copies_to_drop(session, limit=1), write=False):
                from code_worker.data.erasure.leftovers import drop_copies
                from code_worker.data.kept_copies import open_kept

                drop_copies(self._store, open_kept(self._settings))
        except (DatasetError, StoreError) as error:
            log.warning("copies_wait", error=str(error))

    def _take_turn(self, seconds: float) -> bool:
        return self._store.run(lambda session: workers.take_lease(session, _ROLE, self._owner, seconds))

    def _pass(self) -> Mapping[str, int]:
        deadline = time.monotonic() + self._settings.retention.pass_s
        deleted: dict[str, int] = {}
        for name, step in self._steps().items():
            while self._goes_on(deadline) and (count := step()):
                deleted[name] = deleted.get(name, 0) + count
        if deleted:
            log.info("retention_deleted", **deleted)
        return deleted

    def _goes_on(self, deadline: float) -> bool:
        # The lease is renewed before each batch, which is over long before it.
        return not self._stopped.is_set() and time.monotonic() < deadline and self._take_turn(_LEASE_S)

    def _steps(self) -> Mapping[str, Callable[[], int]]:
        """Returns what deletes one batch of each kind that has an age; 0 when nothing is left."""
        ages = {name: getattr(self._settings.retention, f"{name}_days") for name in (*retention.PRUNERS, "labels")}
        steps = {
            name: partial(self._prune, prune, days)
            for name, prune in retention.PRUNERS.items()
            if (days := ages[name]) is not None
        }
        if (days := ages["labels"]) is not None:
            steps["labels"] = partial(self._forget_labels, days)
        return steps

    def _prune(self, prune: retention.Prune, days: float) -> int:
        limit = self._settings.retention.batch
        return self._store.run(lambda session: prune(session, days, limit))

    def _forget_labels(self, days: float) -> int:
        limit = self._settings.retention.batch
        old = self._store.run(lambda session: retention.old_images(session, days, limit), write=False)
        count = self._store.run(lambda session: retention.forget_labels(session, old, days)) if old else 0
        self._drop_copies()
        return count
