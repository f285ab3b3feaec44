"""When the detector learns by itself: cron lines, the times they mean, and what is due now."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from celery.schedules import crontab

from code_worker.errors import BrokerUnavailableError, ConfigurationError
from code_worker.logs import get_logger
from code_worker.queues import REFIT, RETRAIN, TRAIN_QUEUE, WATCH
from code_worker.store import policies, releases, runs, schedule

if TYPE_CHECKING:
    from code_worker.doorbell import Doorbell
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store

__all__ = [
    "CALIBRATE",
    "TASKS",
    "Watcher",
    "beat_entries",
    "calibration_due",
    "due",
    "due_slot",
    "schedules",
    "times_from",
    "times_until",
]

TASKS: Final = {"retrain": RETRAIN, "refit": REFIT}
"""Kind of run → task."""
CALIBRATE: Final = "calibrate"
"""What is due after a promotion instead of by the clock; its times are those of the promotions."""
_EXPIRES_S: Final = 3600.0
_LOOK_EVERY_S: Final = 15.0
_FRESH: Final = timedelta(minutes=2)
# Once in forty years at the rarest: 29 February on one day of the week around a century that has none.
_DAYS: Final = 366 * 40 + 1
log = get_logger(__name__)


def schedules(settings: Settings) -> dict[str, crontab]:
    """The schedules that are set, by kind of run.

    Raises:
        ConfigurationError: a line that is no cron line.
    """
    lines = {kind: getattr(settings.schedule, kind) for kind in TASKS}
    return {kind: _parsed(kind, line) for kind, line in lines.items() if line is not None}


def _parsed(kind: str, line: str) -> crontab:
    try:
        return _that_comes(crontab.from_string(line))
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            f"CODE_WORKER_SCHEDULE__{kind.upper()}: {line!r} is no cron line ({error}); "
            "write five fields, such as `0 3 * * sun`: minute, hour, day of month, month, day of week"
        ) from None


def _that_comes(cron: crontab) -> crontab:
    # Celery itself looks for days that no month has from 5.7 on.
    if next(_days(cron, datetime.now(UTC), 1), None) is None:
        raise ValueError("no such day")
    return cron


def beat_entries(settings: Settings) -> dict[str, dict[str, Any]]:
    """Entries of a beat schedule, for those schedules that are set.

    Raises:
        ConfigurationError: see `schedules`.
    """
    return {
        TASKS[kind]: {
            "task": TASKS[kind],
            "schedule": cron,
            "kwargs": {"scheduled": True},
            # Later it is the watcher's: it finds every time that was missed.
            "options": {"queue": TRAIN_QUEUE, "expires": _EXPIRES_S},
        }
        for kind, cron in schedules(settings).items()
    }


def times_until(cron: crontab, now: datetime) -> Iterator[datetime]:
    """Times in UTC at which a cron line was due, from the last one not after `now` backwards.

    As in Celery, day of month and day of week must both fit.
    """
    for day in _days(cron, now, -1):
        for hour in sorted(cron.hour, reverse=True):
            for minute in sorted(cron.minute, reverse=True):
                if (at := day.replace(hour=hour, minute=minute)) <= now:
                    yield at


def times_from(cron: crontab, now: datetime) -> Iterator[datetime]:
    """Times in UTC at which a cron line will be due, the first after `now` first."""
    for day in _days(cron, now, 1):
        for hour in sorted(cron.hour):
            for minute in sorted(cron.minute):
                if (at := day.replace(hour=hour, minute=minute)) > now:
                    yield at


def _days(cron: crontab, now: datetime, step: int) -> Iterator[datetime]:
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    for number in range(_DAYS):
        day = today + timedelta(days=step * number)
        fits = day.month in cron.month_of_year and day.day in cron.day_of_month
        if fits and day.isoweekday() % 7 in cron.day_of_week:
            yield day


def due_slot(session: Session, kind: str, cron: crontab, now: datetime) -> datetime | None:
    """The last time of a schedule, if nobody took it; of several that were missed only the last counts.

    What lies before a schedule was first looked at was not missed: that time is noted, and no run is due.
    """
    at = next(times_until(cron, now), None)
    if at is None:
        return None
    last = schedule.last(session, kind)
    if last is None and now - at > _FRESH:
        schedule.take(session, kind, at, run_id=None, outcome="before the schedule was watched")
        return None
    return at if last is None or last.slot < at else None


def due(session: Session, settings: Settings, now: datetime) -> list[str]:
    """What a trainer should turn to now: `resume`, else kinds of run and `calibrate`; nothing while a run runs."""
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
    last = schedule.last(session, CALIBRATE)
    return at if last is None or last.slot < at else None


class Watcher:
    """Rings for a trainer when something is due: a run that was left behind, or a time that beat did not see."""

    def __init__(self, settings: Settings, store: Store, doorbell: Doorbell) -> None:
        self.interval_s = min(_LOOK_EVERY_S, settings.training.lease_s)
        self._settings = settings
        self._store = store
        self._doorbell = doorbell

    def look(self) -> None:
        """One look; the message expires before the next one, so that none pile up."""
        found = self._store.run(lambda session: due(session, self._settings, datetime.now(UTC)))
        if not found:
            return
        log.info("learning_due", what=found)
        try:
            self._doorbell.call(WATCH, TRAIN_QUEUE, expires_s=self.interval_s)
        except BrokerUnavailableError as error:
            log.warning("broker_unavailable", error=str(error))
