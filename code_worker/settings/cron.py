"""Reads cron lines as the scheduler does, without it: settings are read where nothing is scheduled."""

from __future__ import annotations

import re
from typing import Final

_DAYS_OF_WEEK: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_SHORTHANDS: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_FIELDS: Final = (
    ("minute", 0, 59),
    ("hour", 0, 23),
    ("day of month", 1, 31),
    ("month", 1, 12),
    ("day of week", 0, 6),
)
_NUMBER: Final = "[0-9]{1,4}|[a-z]+"
_PART: Final = re.compile(rf"(?:\*|(?P<low>{_NUMBER})(?:-(?P<high>{_NUMBER}))?)(?:/(?P<step>[0-9]{{1,4}}))?")
_MONTH_DAYS: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def cron_line(text: str) -> str:
    """The line with one space between its fields; in UTC: minute, hour, day of month, month, day of week.

    Raises:
        ValueError: it is none, or names a day that no year has.
    """
    fields = text.split()
    try:
        if text.strip().lower() in _SHORTHANDS:
            raise ValueError(f"forms with @ are not read: write `{_SHORTHANDS[text.strip().lower()]}`")
        if len(fields) > len(_FIELDS) and all(field[:3].lower() in _DAYS_OF_WEEK for field in fields[4:]):
            raise ValueError(f"several days are one field: `{','.join(fields[4:])}`")
        if len(fields) != len(_FIELDS):
            raise ValueError(f"{len(fields)} {'field' if len(fields) == 1 else 'fields'}")
        sets = [_read(field, *kind) for field, kind in zip(fields, _FIELDS, strict=True)]
        if not any(day <= _MONTH_DAYS[month - 1] for day in sets[2] for month in sets[3]):
            raise ValueError("no such day")
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no cron line ({error}); "
            "write five fields, such as `0 3 * * sun`: minute, hour, day of month, month, day of week"
        ) from None
    return " ".join(fields)


def _read(field: str, name: str, least: int, most: int) -> set[int]:
    """Returns what a field stands for: `*`, numbers and ranges, which may go round; `*` and ranges may have steps."""
    found: set[int] = set()
    for part in field.lower().split(","):
        match = _PART.fullmatch(part)
        if match is None or (match["step"] and match["low"] and not match["high"]) or int(match["step"] or 1) == 0:
            raise ValueError(f"{name}: {part!r}")
        every = list(range(least, most + 1))
        if match["low"]:
            low = _number(match["low"], name, least, most)
            high = _number(match["high"] or match["low"], name, least, most)
            every = [*range(low, high + 1)] if low <= high else [*range(low, most + 1), *range(least, high + 1)]
        found.update(every[:: int(match["step"] or 1)])
    return found


def _number(text: str, name: str, least: int, most: int) -> int:
    if text.isdigit():
        value = int(text)
    elif most == len(_DAYS_OF_WEEK) - 1 and text[:3] in _DAYS_OF_WEEK:  # as Celery: `tues`, `thursday`
        value = _DAYS_OF_WEEK.index(text[:3])
    else:
        raise ValueError(f"{name}: {text!r}")
    if not least <= value <= most:
        raise ValueError(f"{name}: {value} is not from {least} to {most}")
    return value
