"""Snapshots that runs learned from and were measured on, heads that were taken over, and comparisons of the gate."""

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

from code_worker.errors import ArtifactError, StoreError
from code_worker.store.erasure import personal, receipts
from code_worker.store.ids import as_uuid
from code_worker.store.learning import runs
from code_worker.store.models import GateComparisonRow, RunRow, SnapshotRow, db_now
from code_worker.store.sql import insert_into, insert_new, table_of

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
    id: str,
    digest: str,
    rule: str,
    counts: Mapping[str, Any],
    members: bytes,
) -> None:
    """Keeps a snapshot; one that is there stays. `members` is what `pack` gives."""
    row = {"id": id, "digest": digest, "rule": rule, "counts": dict(counts), "members": members}
    insert_new(session, SnapshotRow, [row], same=["id"])


def get(session: Session, snapshot_id: str) -> SnapshotInfo | None:
    """Returns what a snapshot is, or None."""
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
    fields = ("sha256", "label", "generator", "collection", "split")
    known = [[row[name] for name in fields] for row in rows]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def pack(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON lines, compressed; the same rows give the same bytes."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")) for row in rows)
    # JSON writes a line break inside a text as an escape: one line is one row.
    return zlib.compress("\n".join(lines).encode(), 6)


def unpack(packed: bytes) -> list[dict[str, Any]]:
    """The rows that were packed.

    Raises:
        StoreError: the bytes are damaged.
    """
    try:
        text = zlib.decompress(packed).decode()
        # Not splitlines(): it would also cut at U+2028 and its like, which JSON leaves as they are.
        return [json.loads(line) for line in text.split("\n") if line]
    except (zlib.error, ValueError) as error:
        raise StoreError(f"the members of a snapshot cannot be read: {error}") from error


def check_kept_heads(session: Session, base: str) -> None:
    """Makes sure that nothing is erased that heads of `base` learned from, and nothing will be in this transaction.

    To be asked before the first write.

    Raises:
        ArtifactError: an erasure is about to delete the files of `base`, or to find out that it must.
    """
    line = runs.ancestry(session, [base])
    taught = {run.snapshot_id or "" for made in line.values() for run in made}
    images = {row["sha256"] for one in sorted(taught) for row in unpack(members(session, one))}
    if personal.left(session, images=images).images != images or base in receipts.releases_owed(session):
        raise ArtifactError(
            f"heads of {base} learned from what was erased, and must not be taken over: fit every head again with "
            "`code-worker refit`"
        )


def note_kept_heads(session: Session, release: str, *, run_id: str, base: str, by: str) -> None:
    """Records that a release has heads of another one: it learned what that one did. After `check_kept_heads`.

    Nothing is recorded of a base that no run here made.
    """
    made = runs.ancestry(session, [base])[base]
    if not made:
        return
    row = {
        "id": run_id,
        "kind": "refit",
        "state": "skipped",
        "stage": "kept",
        "by": by,
        "attempts": 1,
        "token": 1,
        # As of a refit of some heads, here of none: the others are those of the base.
        "config": {"heads": {}},
        "snapshot_id": made[0].snapshot_id,
        "base_release": base,
        "candidate": release,
        "reasons": [f"nothing was fitted: {release} has the heads of {base} but one"],
        "report": {},
        "finished_at": db_now(),
    }
    # Born ended: it is no run that a trainer could take over, and the index of the running one has no place for it.
    session.execute(insert_into(session, RunRow).on_conflict_do_nothing().values(row))


_COMPARISONS = table_of(GateComparisonRow)


@dataclass(frozen=True, slots=True)
class ComparisonInfo:
    """One candidate beside one champion."""

    run_id: str
    candidate: str
    images: int
    level: float


def before(session: Session, champion: str, *, run_id: str) -> list[ComparisonInfo]:
    """Comparisons of other runs with a champion, the first one first.

    A run that is resumed compares the same candidate again: its own is not another chance.
    """
    table = _COMPARISONS.c
    statement = (
        select(table.run_id, table.candidate, table.images, table.level)
        # By ix_gate_comparisons_champion_created_at.
        .where(table.champion == champion, table.run_id != run_id)
        .order_by(table.created_at, table.run_id)
    )
    return [ComparisonInfo(**row) for row in session.execute(statement).mappings()]


def note_comparison(
    session: Session, *, run_id: str, champion: str, candidate: str, images: int, level: float
) -> None:
    """Writes that a comparison is made, before it is: a process that dies over it has had the chance."""
    row = {"run_id": run_id, "champion": champion, "candidate": candidate, "images": images, "level": level}
    insert_new(session, GateComparisonRow, [row], same=["run_id", "champion"])
