"""Schedules of learning: cron lines, the times they mean, and entries for beat."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo

from celery.schedules import crontab

from code_worker.wire import REFIT, RETRAIN, TRAIN_QUEUE

if TYPE_CHECKING:
    from code_worker.settings import Settings

TASKS: Final = {"retrain": RETRAIN, "refit": REFIT}
"""Kind of run → task."""
CALIBRATE: Final = "calibrate"
"""What is due after a promotion instead of by the clock; its times are those of the promotions."""
_EXPIRES_S: Final = 3600.0
# Once in forty years at the rarest: 29 February on one day of the week around a century that has none.
_DAYS: Final = 366 * 40 + 1


class UtcCrontab(crontab):
    """A cron line that is meant in UTC, also in an app whose `timezone` is another or whose `enable_utc` is off."""

    tz = ZoneInfo("UTC")
    utc_enabled = True

    def now(self) -> datetime:
        """The time in UTC, which Celery's own gives in the zone of the app."""
        return datetime.now(self.tz)

    def maybe_make_aware(self, dt: datetime, naive_as_utc: bool = True) -> datetime:
        """In UTC: before 5.7 Celery compares hours without regard to their zones."""
        aware: datetime = super().maybe_make_aware(dt, naive_as_utc=naive_as_utc)
        return aware.astimezone(self.tz)


def schedules(settings: Settings) -> dict[str, UtcCrontab]:
    """The schedules that are set, by kind of run."""
    lines = {kind: getattr(settings.schedule, kind) for kind in TASKS}
    return {kind: UtcCrontab.from_string(line) for kind, line in lines.items() if line is not None}


def beat_entries(settings: Settings) -> dict[str, dict[str, Any]]:
    """Entries of a beat schedule, for those schedules that are set."""
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
                # UTC has no hour that comes twice or is missing, so every line means one moment a time.
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
    # By Celery's own sets, and not by croniter or cronsim: these take day of month OR day of week, as cron does,
    # where Celery takes both, and a look back must find the very times at which beat fires.
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    for number in range(_DAYS):
        day = today + timedelta(days=step * number)
        fits = day.month in cron.month_of_year and day.day in cron.day_of_month
        if fits and day.isoweekday() % 7 in cron.day_of_week:
            yield day
