"""Ids: UUIDv7 for rows in the order of time, UUIDv5 for jobs that the caller named by a key."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Final
from uuid import UUID, uuid5

__all__ = ["Clock", "as_uuid", "keyed_id", "uuid7", "uuid7_floor", "valid_uuids"]

_JOBS = UUID("6f1c1f0e-5f0c-5d0a-9a70-0c0de0000001")
_CANONICAL: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


class Clock:
    """The database's time between two looks at it, so that ids of all machines are in one order.

    It is carried on by a clock that nobody sets: one that is set an hour ahead moves nothing. Until the database was
    looked at, it is this machine's time.
    """

    def __init__(self) -> None:
        self._ahead_ns: int | None = None

    def agree(self, there_s: float) -> None:
        """Takes over the database's time, in Unix seconds, that was read a moment ago."""
        self._ahead_ns = int(there_s * 1_000_000_000) - _uptime_ns()

    def now_ns(self) -> int:
        """Nanoseconds since 1970."""
        ahead_ns = self._ahead_ns
        return time.time_ns() if ahead_ns is None else _uptime_ns() + ahead_ns


def _uptime_ns() -> int:
    # CLOCK_MONOTONIC stands still while a machine sleeps, and the database's clock does not.
    boot_clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic_ns() if boot_clock is None else time.clock_gettime_ns(boot_clock)


def uuid7(now_ns: int | None = None) -> str:
    """A new UUIDv7 (RFC 9562, section 6.2 method 3): milliseconds, 12 bits of their fraction, 62 random bits.

    Of the moment `now_ns`, in nanoseconds since 1970; unset: of this machine's clock.
    """
    milliseconds, rest_ns = divmod(time.time_ns() if now_ns is None else now_ns, 1_000_000)
    fraction = (rest_ns << 12) // 1_000_000
    random = int.from_bytes(os.urandom(8), "big") >> 2
    # Not by way of UUID: ids are made by the hundred thousand, and the object costs three times as much as the text.
    text = f"{milliseconds << 80 | 7 << 76 | fraction << 64 | 2 << 62 | random:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def uuid7_floor(moment: datetime) -> str:
    """The least UUIDv7 of a moment: ids made before it are smaller, ids made from then on are not."""
    return str(UUID(int=int(moment.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62))


def keyed_id(tenant: str | None, key: str) -> str:
    """The id of the job that a tenant calls `key`; tenants do not share keys."""
    return str(uuid5(_JOBS, f"{tenant or ''}\0{key}"))


def as_uuid(text: str) -> str | None:
    """The canonical spelling of an id, or None when it is no UUID."""
    if _CANONICAL.fullmatch(text):
        return text
    try:
        return str(UUID(text))
    except ValueError:
        return None


def valid_uuids(texts: Iterable[str]) -> list[str]:
    """Canonical, distinct, in the given order; what is no UUID names no row and is left out."""
    return list(dict.fromkeys(known for text in texts if (known := as_uuid(text)) is not None))
