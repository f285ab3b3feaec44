"""Kinds of arguments that several commands take."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import isnan
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

F = TypeVar("F", bound=Callable[..., Any])
LIMIT = click.IntRange(1, 10_000)
_HASH = re.compile(r"[0-9a-f]{64}")
_AGO = re.compile(r"(\d{1,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    # Not generic before click 8.4.
    ParamType = click.ParamType


class _Id(ParamType):
    """A UUID, in its canonical spelling."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return str(UUID(value))
        except ValueError:
            self.fail(f"{value!r} is no id; ids look like 0198c5a2-7f31-7abc-9def-0123456789ab", param, ctx)


class _ContentHash(ParamType):
    """SHA-256 of a file's bytes, in small letters."""

    name = "sha256"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _HASH.fullmatch(value := value.lower()):
            self.fail("a content hash has 64 hexadecimal digits", param, ctx)
        return str(value)


class _AgoOrDate(ParamType):
    """A moment: an ISO date or time (UTC unless it says otherwise), or so long ago (`90s`, `12h`, `7d`, `2w`)."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        if match := _AGO.fullmatch(value):
            try:
                return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
            except OverflowError:
                self.fail(f"{value!r} is before the calendar begins", param, ctx)
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time: write 2026-01-31, 2026-01-31T12:00, 7d or 12h", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class _JsonObject(ParamType):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            parsed = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"not JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail('must be a JSON object, such as {"post": 7}', param, ctx)
        return parsed


class _Share(click.FloatRange):
    """A number between two others; not NaN, which no comparison keeps out."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if isnan(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


ID = _Id()
SHA256 = _ContentHash()
AGO_OR_DATE = _AgoOrDate()
JSON_OBJECT = _JsonObject()
SHARE = _Share(0, 1)
SHARE_BETWEEN = _Share(0, 1, min_open=True, max_open=True)


def json_option(command: F) -> F:
    """`--json`, the same everywhere."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")(command)


def raw_option(command: F) -> F:
    """`--raw`, the same everywhere."""
    text = "With --csv: leave what a spreadsheet runs as a formula (=, +, -, @ …) without an apostrophe."
    return click.option("--raw", is_flag=True, help=text)(command)


def limit_option(default: int) -> Callable[[F], F]:
    """`--limit`, the same everywhere."""
    return click.option("--limit", type=LIMIT, default=default, show_default=True, help="At most so many rows.")
