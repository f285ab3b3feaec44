"""Watches what is due to be learned, by the ledger and the schedules, and learns it."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from code_worker.errors import BrokerUnavailableError
from code_worker.logs import get_logger
from code_worker.store import policies, releases
from code_worker.store.learning import runs
from code_worker.wire import TRAIN_QUEUE, WATCH
from code_worker.worker.schedule import CALIBRATE, schedules, times_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery.schedules import crontab

    from code_worker.publisher import Publisher
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store
    from code_worker.training.learner import DueSlot, Learner

_LOOK_EVERY_S: Final = 15.0
_FRESH: Final = timedelta(minutes=2)
log = get_logger(__name__)


def due_slot(session: Session, kind: str, cron: crontab, now: datetime) -> datetime | None:
    """The last time of a schedule, if nobody took it; of several that were missed only the last counts.

    What lies before a schedule was first looked at was not missed: that time is noted, and no run is due.
    """
    at = next(times_until(cron, now), None)
    if at is None:
        return None
    last = runs.last_slot(session, kind)
    # Taken without a run, in the transaction of this look: the next one finds it, and none is due.
    if last is None and now - at > _FRESH:
        runs.take_slot(session, kind, at, run_id=None, outcome="before the schedule was watched")
        return None
    return at if last is None or last.slot < at else None


def due(session: Session, settings: Settings, now: datetime) -> list[str]:
    """Returns what a trainer should turn to now.

    `resume`, else kinds of run and `calibrate`; nothing while a run runs.
    """
    if runs.lapsed(session, lapse_s=settings.training.lease_s):
        return ["resume"]
    if runs.running(session) is not None:
        return []
    found = [kind for kind, cron in schedules(settings).items() if due_slot(session, kind, cron, now) is not None]
    return [*found, CALIBRATE] if calibration_due(session, settings) is not None else found


def calibration_due(session: Session, settings: Settings) -> datetime | None:
    """Time of the last promotion, if thresholds are to be drawn anew after it and nobody has tried yet."""
    champion = releases.alias(session, releases.CHAMPION) if settings.schedule.calibrate else None
    if not policies.redrawable(session, champion):
        return None
    at = next(move.at for move in releases.moves(session, releases.CHAMPION, limit=1))
    last = runs.last_slot(session, CALIBRATE)
    return at if last is None or last.slot < at else None


class Watcher:
    """Sends a trainer a message when something is due: a run that was left behind, or a time that beat did not see.

    Args:
        settings: which schedules there are.
        store: gives the ledger at each look; one that is away, or not migrated yet, fails that look alone.
        publisher: where to publish.
    """

    def __init__(self, settings: Settings, store: Callable[[], Store], publisher: Publisher) -> None:
        self.interval_s = min(_LOOK_EVERY_S, settings.training.lease_s)
        self._settings = settings
        self._store = store
        self._publisher = publisher

    def look(self) -> None:
        """One look; the message expires before the next one, so that none pile up."""
        # This machine's clock, since a cron line means the time of
        # day; who runs it, the slot's row decides for all clocks.
        found = self._store().run(lambda session: due(session, self._settings, datetime.now(UTC)))
        if not found:
            return
        log.info("learning_due", what=found)
        try:
            self._publisher.call(WATCH, TRAIN_QUEUE, expires_s=self.interval_s)
        except BrokerUnavailableError as error:
            log.warning("broker_unavailable", error=str(error))


class Learning:
    """The learner of one process; runs one after the other."""

    def __init__(self, settings: Settings, store: Store, stop: threading.Event) -> None:
        self._settings = settings
        self._store = store
        self._stop = stop
        self._made: Learner | None = None
        # A foreign app may run our tasks on several threads.
        self._turn = threading.Lock()

    @property
    def _learner(self) -> Learner:
        if self._made is None:
            from code_worker.training.learner import Learner

            self._made = Learner(self._settings, self._store, stop=self._stop)
        return self._made

    def now(self, kind: str, *, by: str, **asked: Any) -> None:
        """A run that somebody asked for; `asked` are the fields of `training.retrain.Asked`.

        Raises:
            CodeWorkerError: see `Learner.learn`.
        """
        with self._turn:
            self._learner.learn(kind, by=by, **asked)

    def on_schedule(self, kind: str) -> None:
        """A run for the last time of its schedule, unless another trainer took that.

        Raises:
            CodeWorkerError: see `Learner.learn`.
        """
        if (slot := self._due(kind)) is None:
            return
        with self._turn:
            self._learner.learn(kind, by=f"schedule: {kind} of {slot.at:%Y-%m-%d %H:%M}", slot=slot)

    def watch(self) -> None:
        """Finishes what a dead process left behind, runs what is due, then draws thresholds for a new champion.

        Raises:
            CodeWorkerError: see `Learner.learn`.
        """
        with self._turn:
            # First, and with the lock let go of afterwards: what a dead process left holds the one place for a run.
            self._learner.resume()
        for kind in schedules(self._settings):
            self.on_schedule(kind)
        with self._turn:
            self._calibrate()

    def _calibrate(self) -> None:
        """Once after each promotion; what cannot be drawn stays stale, as `doctor` and `policies list` say."""
        due = self._store.run(lambda session: calibration_due(session, self._settings))
        if due is None:
            return
        from code_worker.plugins import load_plugins  # plugins and numpy, once something is due
        from code_worker.releases.registry import open_registry
        from code_worker.training.evaluation.calibration import recalibrate

        registry = open_registry(self._settings, store=self._store, plugins=load_plugins(self._settings))
        # Under the authority of the person who set the schedule, as its runs are.
        by = f"schedule: {CALIBRATE} after the promotion of {due:%Y-%m-%d %H:%M}"
        redrawn = recalibrate(self._settings, self._store, registry, by=by)
        left = [one.policy.scope for one in redrawn if one.problem]
        outcome = f"{len(redrawn) - len(left)} drawn anew" + (f"; still stale: {'; '.join(left)}" if left else "")
        self._store.run(lambda session: runs.take_slot(session, CALIBRATE, due, run_id=None, outcome=outcome))

    def _due(self, kind: str) -> DueSlot | None:
        from code_worker.training.learner import DueSlot

        cron, now = schedules(self._settings).get(kind), datetime.now(UTC)
        if cron is None:
            return None
        at = self._store.run(lambda session: due_slot(session, kind, cron, now))
        return None if at is None else DueSlot(kind, at)
