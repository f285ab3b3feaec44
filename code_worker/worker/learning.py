"""The tasks that learn: they carry no data, since a run is in the ledger and goes on from there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from code_worker.errors import CodeWorkerError, RunActiveError, RunStoppedError
from code_worker.logs import get_logger
from code_worker.queues import WATCH
from code_worker.store import schedule
from code_worker.worker.schedule import CALIBRATE, TASKS, calibration_due, due_slot, schedules

if TYPE_CHECKING:
    from celery import Celery

    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.training.retrain import DueSlot, Learner
    from code_worker.worker.host import Host

__all__ = ["Learning", "register_learning"]

log = get_logger(__name__)


def register_learning(app: Celery, host: Host) -> None:
    """Adds `code_worker.retrain`, `code_worker.refit` and `code_worker.learning_watch` to the app.

    They are acknowledged before they begin: a run that dies with its process is found in the ledger, and a message
    that comes back hours later would start another.
    """
    options = {"acks_late": False, "reject_on_worker_lost": False, "ignore_result": True, "shared": False}
    for kind, task in TASKS.items():
        app.task(_learning_task(kind, host), name=task, **options)

    def watch() -> None:
        _log_instead(lambda: host.learning().watch())

    app.task(watch, name=WATCH, **options)


def _learning_task(kind: str, host: Host) -> Callable[..., None]:
    def learn(*, scheduled: bool = False, by: str = "task", **asked: Any) -> None:
        if scheduled:
            _log_instead(lambda: host.learning().on_schedule(kind))
        else:
            _log_instead(lambda: host.learning().now(kind, by=by, **asked))

    return learn


def _log_instead(work: Callable[[], None]) -> None:
    """A task's end says nothing to anybody; what our own errors say goes to the log."""
    try:
        work()
    except (RunActiveError, RunStoppedError) as error:
        log.info("learning_put_off", reason=str(error))
    except CodeWorkerError as error:
        log.error("learning_failed", error=str(error))  # noqa: TRY400 - a traceback would not help


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
            from code_worker.training.retrain import Learner  # noqa: PLC0415 - numpy, plugins: once something is due

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
        from code_worker.plugins import load_plugins  # noqa: PLC0415 - plugins and numpy, once something is due
        from code_worker.releases.registry import open_registry  # noqa: PLC0415 - as above
        from code_worker.training.recalibrate import recalibrate  # noqa: PLC0415 - as above

        registry = open_registry(self._settings, store=self._store, plugins=load_plugins(self._settings))
        # Under the authority of whoever set the schedule, as its runs are.
        by = f"schedule: {CALIBRATE} after the promotion of {due:%Y-%m-%d %H:%M}"
        redrawn = recalibrate(self._settings, self._store, registry, by=by)
        left = [one.policy.scope for one in redrawn if one.problem]
        outcome = f"{len(redrawn) - len(left)} drawn anew" + (f"; still stale: {'; '.join(left)}" if left else "")
        self._store.run(lambda session: schedule.take(session, CALIBRATE, due, run_id=None, outcome=outcome))

    def _due(self, kind: str) -> DueSlot | None:
        from code_worker.training.retrain import DueSlot  # noqa: PLC0415 - as above

        cron, now = schedules(self._settings).get(kind), datetime.now(UTC)
        if cron is None:
            return None
        at = self._store.run(lambda session: due_slot(session, kind, cron, now))
        return None if at is None else DueSlot(kind, at)
