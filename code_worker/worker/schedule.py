"""When the detector learns by itself: cron lines, the times they mean, and entries for beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo

from celery.schedules import crontab

from code_worker.configuration import place_of
from code_worker.errors import ConfigurationError
from code_worker.queues import REFIT, RETRAIN, TRAIN_QUEUE

if TYPE_CHECKING:
    from code_worker.settings import Settings

__all__ = ["CALIBRATE", "TASKS", "UtcCrontab", "beat_entries", "schedules", "times_from", "times_until"]

TASKS: Final = {"retrain": RETRAIN, "refit": REFIT}
"""Kind of run → task."""
CALIBRATE: Final = "calibrate"
"""What is due after a promotion instead of by the clock; its times are those of the promotions."""
_EXPIRES_S: Final = 3600.0
_FIELDS: Final = 5
# Once in forty years at the rarest: 29 February on one day of the week around a century that has none.
_DAYS: Final = 366 * 40 + 1


class UtcCrontab(crontab):  # type: ignore[misc]  # Celery ships no types
    """A cron line that is meant in UTC, also in an app whose `timezone` is another or whose `enable_utc` is off."""

    tz = ZoneInfo("UTC")
    utc_enabled = True

    def now(self) -> datetime:
        """The time in UTC, which Celery's own gives in the zone of the app."""
        return datetime.now(self.tz)

    def maybe_make_aware(self, dt: datetime, naive_as_utc: bool = True) -> datetime:
        """In UTC: before 5.7 Celery compares the hours of whatever zone a time is in."""
        aware: datetime = super().maybe_make_aware(dt, naive_as_utc=naive_as_utc)
        return aware.astimezone(self.tz)


def schedules(settings: Settings, *, below: Mapping[str, object] | None = None) -> dict[str, UtcCrontab]:
    """The schedules that are set, by kind of run; an error names where a line stands, at last in `below`.

    Raises:
        ConfigurationError: a line that is no cron line.
    """
    lines = {kind: getattr(settings.schedule, kind) for kind in TASKS}
    crons = {}
    for kind, line in lines.items():
        if line is not None:
            try:
                crons[kind] = _parsed(line)
            except ConfigurationError as error:
                place = place_of(type(settings), ("schedule", kind), line, below or {})
                raise ConfigurationError(f"{place}: {error}") from None
    return crons


def _parsed(line: str) -> UtcCrontab:
    try:
        if len(fields := line.split()) != _FIELDS:
            raise ValueError(f"{len(fields)} fields")
        return _that_comes(UtcCrontab.from_string(line))
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{line!r} is no cron line ({error}); "
            "write five fields, such as `0 3 * * sun`: minute, hour, day of month, month, day of week"
        ) from None


def _that_comes(cron: UtcCrontab) -> UtcCrontab:
    # Celery itself looks for days that no month has from 5.7 on.
    if next(_days(cron, datetime.now(UTC), 1), None) is None:
        raise ValueError("no such day")
    return cron


def beat_entries(settings: Settings, *, below: Mapping[str, object] | None = None) -> dict[str, dict[str, Any]]:
    """Entries of a beat schedule, for those schedules that are set; `below` as in `schedules`.

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
        for kind, cron in schedules(settings, below=below).items()
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
