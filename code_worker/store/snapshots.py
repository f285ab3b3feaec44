"""Frozen lists of labelled images: what a run learned from and was measured on."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.store.ids import as_uuid
from code_worker.store.models import SnapshotRow
from code_worker.store.splits import recorded_split
from code_worker.store.sql import insert_new, table_of

__all__ = ["SnapshotInfo", "add", "digest_of", "get", "members", "pack", "unpack"]

_SNAPSHOTS = table_of(SnapshotRow)


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot without its members."""

    id: str
    digest: str
    rule: str
    counts: Mapping[str, Any]
    created_at: datetime


_COLUMNS = tuple(_SNAPSHOTS.c[name] for name in SnapshotInfo.__dataclass_fields__)


def add(
    session: Session,
    *,
    id: str,  # noqa: A002 - the word of the table
    digest: str,
    rule: str,
    counts: Mapping[str, Any],
    members: bytes,
) -> None:
    """Keeps a snapshot; one that is there stays. `members` is what `pack` gives."""
    row = {"id": id, "digest": digest, "rule": rule, "counts": dict(counts), "members": members}
    insert_new(session, SnapshotRow, [row], same=["id"])


def get(session: Session, snapshot_id: str) -> SnapshotInfo | None:
    """What a snapshot is, or None."""
    if (known := as_uuid(snapshot_id)) is None:
        return None
    row = session.execute(select(*_COLUMNS).where(_SNAPSHOTS.c.id == known)).mappings().one_or_none()
    return None if row is None else SnapshotInfo(**row)


def members(session: Session, snapshot_id: str) -> bytes:
    """The packed members.

    Raises:
        StoreError: there is no such snapshot.
    """
    known = as_uuid(snapshot_id)
    found = None if known is None else session.scalar(select(_SNAPSHOTS.c.members).where(_SNAPSHOTS.c.id == known))
    if found is None:
        raise StoreError(f"no snapshot {snapshot_id}")
    return bytes(found)


def digest_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Of what members teach: image, label, generator, collection and part; equal digests teach the same."""
    known = [
        [
            row["sha256"],
            row["label"],
            row["generator"],
            row["collection"],
            recorded_split(row["sha256"], row.get("split")),
        ]
        for row in rows
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def pack(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON lines, compressed; the same rows give the same bytes."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")) for row in rows)
    return zlib.compress("\n".join(lines).encode(), 6)


def unpack(packed: bytes) -> list[dict[str, Any]]:
    """The rows that were packed.

    Raises:
        StoreError: the bytes are damaged.
    """
    try:
        text = zlib.decompress(packed).decode()
        return [json.loads(line) for line in text.split("\n") if line]
    except (zlib.error, ValueError) as error:
        raise StoreError(f"the members of a snapshot cannot be read: {error}") from error
