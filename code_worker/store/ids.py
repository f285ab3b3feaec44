"""Ids: UUIDv7 for rows in the order of time, UUIDv5 for jobs that the caller named by a key."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Final
from uuid import UUID, uuid5

NEW_ID: Final = "new_id"
"""What a session's `info` holds: a function that makes ids in the order of the database's time."""
_JOBS = UUID("6f1c1f0e-5f0c-5d0a-9a70-0c0de0000001")
_CANONICAL: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


def uuid7(now_s: float | None = None) -> str:
    """A new UUIDv7 (RFC 9562, section 6.2 method 3): milliseconds, 12 bits of their fraction, 62 random bits.

    Of the moment `now_s`, in Unix seconds; unset: of this machine's clock.
    """
    now_ns = time.time_ns() if now_s is None else int(now_s * 1_000_000_000)
    milliseconds, rest_ns = divmod(now_ns, 1_000_000)
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
    # Neither may hold a NUL (see `wire`), so that no other tenant and key are joined to the same text.
    return str(uuid5(_JOBS, f"{tenant or ''}\0{key}"))


def as_uuid(text: str) -> str | None:
    """The canonical spelling of an id, or None when it is no UUID."""
    # Spares a UUID object per id. What else UUID() reads (braces, capitals, `urn:`) is brought to the one spelling
    # that rows, messages and lists of ids are compared by.
    if _CANONICAL.fullmatch(text):
        return text
    try:
        return str(UUID(text))
    except ValueError:
        return None


def valid_uuids(texts: Iterable[str]) -> list[str]:
    """Canonical, distinct, in the given order; what is no UUID names no row and is left out."""
    return list(dict.fromkeys(known for text in texts if (known := as_uuid(text)) is not None))
