"""Receipts of erasures: what was erased when, why and how much, told to whoever has the original and nobody else."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.queues import chunks
from code_worker.store.ids import as_uuid
from code_worker.store.models import ErasedDigestRow, ErasureRow, ErasureTargetRow, db_now
from code_worker.store.sql import IN_LIST, insert_new, plain, table_of

__all__ = [
    "IMAGE",
    "JOB",
    "TENANT",
    "WAITING",
    "Receipt",
    "add_targets",
    "begin",
    "drop_targets",
    "finish",
    "get",
    "list_receipts",
    "new_salt",
    "note",
    "releases_owed",
    "still_open",
    "targeted",
    "targets",
    "was_erased",
]

JOB: Final = "job"
IMAGE: Final = "image"
TENANT: Final = "tenant"
WAITING: Final = "waiting"
"""Stands on a receipt for files of a release that are deleted once no alias points to it."""
_ERASURES = table_of(ErasureRow)
_TARGETS = table_of(ErasureTargetRow)
_DIGESTS = table_of(ErasedDigestRow)
_MAX_WHY: Final = 2000


@dataclass(frozen=True, slots=True)
class Receipt:
    """One erasure; `finished_at` is None while something of it is left."""

    id: str
    state: str
    scope: str
    by: str
    why: str
    counts: Mapping[str, int]
    releases: Mapping[str, Mapping[str, str]]
    runs: list[str]
    created_at: datetime
    finished_at: datetime | None


_COLUMNS: Final = tuple(_ERASURES.c[name] for name in Receipt.__dataclass_fields__)


def new_salt() -> str:
    """Of one receipt's digests; made outside a transaction, so that a retry writes the same."""
    return secrets.token_hex(16)


def begin(session: Session, *, id: str, scope: str, by: str, why: str, salt: str) -> None:  # noqa: A002 - the table's word
    """Opens a receipt; opening it again changes nothing."""
    row = {
        "id": id,
        "state": "running",
        "scope": scope,
        "by": plain(by, 300),
        "why": plain(why, _MAX_WHY),
        "salt": salt,
        "counts": {},
        "releases": {},
        "runs": [],
    }
    insert_new(session, ErasureRow, [row], same=["id"])


def add_targets(session: Session, erasure_id: str, kind: str, values: Iterable[str]) -> None:
    """Notes what is to be erased, and its digest, which stays; a tenant's name is noted as a digest alone."""
    salt = session.scalar(select(_ERASURES.c.salt).where(_ERASURES.c.id == erasure_id))
    if salt is None:
        raise StoreError(f"no erasure {erasure_id}")
    named = sorted(set(values))
    if kind != TENANT:
        rows = [{"erasure_id": erasure_id, "kind": kind, "value": value} for value in named]
        insert_new(session, ErasureTargetRow, rows, same=["erasure_id", "kind", "value"])
    digests = sorted(_digest(salt, kind, value) for value in named)
    insert_new(
        session,
        ErasedDigestRow,
        [{"erasure_id": erasure_id, "digest": digest} for digest in digests],
        same=["erasure_id", "digest"],
    )


def _digest(salt: str, kind: str, value: str) -> str:
    return hmac.new(bytes.fromhex(salt), f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()


def targets(session: Session, erasure_id: str, kind: str, *, after: str = "", limit: int) -> list[str]:
    """What is still to be erased, sorted."""
    statement = select(_TARGETS.c.value).where(
        _TARGETS.c.erasure_id == erasure_id, _TARGETS.c.kind == kind, _TARGETS.c.value > after
    )
    return list(session.scalars(statement.order_by(_TARGETS.c.value).limit(limit)))


def targeted(session: Session, erasure_id: str, kind: str, values: Collection[str]) -> set[str]:
    """Those of the values that are still to be erased."""
    found: set[str] = set()
    for some in chunks(sorted(values), IN_LIST):
        statement = select(_TARGETS.c.value).where(
            _TARGETS.c.erasure_id == erasure_id, _TARGETS.c.kind == kind, _TARGETS.c.value.in_(some)
        )
        found.update(session.scalars(statement))
    return found


def drop_targets(
    session: Session, erasure_id: str, kind: str, values: Collection[str], *, spared: bool = False
) -> None:
    """These need not be erased any more; what was spared was not erased either, so its digest goes too."""
    salt = session.scalar(select(_ERASURES.c.salt).where(_ERASURES.c.id == erasure_id)) or ""
    for some in chunks(sorted(values), IN_LIST):
        session.execute(
            delete(_TARGETS).where(
                _TARGETS.c.erasure_id == erasure_id, _TARGETS.c.kind == kind, _TARGETS.c.value.in_(some)
            )
        )
        if spared:
            digests = [_digest(salt, kind, value) for value in some]
            session.execute(
                delete(_DIGESTS).where(_DIGESTS.c.erasure_id == erasure_id, _DIGESTS.c.digest.in_(digests))
            )


def note(
    session: Session,
    erasure_id: str,
    *,
    counts: Mapping[str, int] | None = None,
    releases: Mapping[str, Mapping[str, str]] | None = None,
    runs: Iterable[str] = (),
) -> None:
    """Adds to the receipt: counts are added up, releases and runs joined."""
    known = get(session, erasure_id, lock=True)
    if known is None:
        raise StoreError(f"no erasure {erasure_id}")
    added = {name: known.counts.get(name, 0) + count for name, count in (counts or {}).items() if count}
    session.execute(
        update(_ERASURES)
        .where(_ERASURES.c.id == erasure_id)
        .values(
            counts={**known.counts, **added},
            releases={**known.releases, **(releases or {})},
            runs=sorted({*known.runs, *runs}),
        )
    )


def finish(session: Session, erasure_id: str) -> None:
    """Closes the receipt; with it goes every note of what was to be erased."""
    session.execute(delete(_TARGETS).where(_TARGETS.c.erasure_id == erasure_id))
    session.execute(
        update(_ERASURES)
        .where(_ERASURES.c.id == erasure_id, _ERASURES.c.state == "running")
        .values(state="done", finished_at=db_now())
    )


def get(session: Session, erasure_id: str, *, lock: bool = False) -> Receipt | None:
    """One receipt, or None; locked, nobody else adds to it until the transaction ends."""
    if (known := as_uuid(erasure_id)) is None:
        return None
    statement = select(*_COLUMNS).where(_ERASURES.c.id == known)
    row = session.execute(statement.with_for_update() if lock else statement).mappings().one_or_none()
    return None if row is None else Receipt(**row)


def list_receipts(session: Session, *, after: str | None = None, limit: int | None = None) -> list[Receipt]:
    """Receipts, newest first, after the id `after` of the page before.

    Raises:
        StoreError: `after` is no id.
    """
    statement = select(*_COLUMNS).order_by(_ERASURES.c.id.desc()).limit(limit)
    if after is not None:
        if (last := as_uuid(after)) is None:
            raise StoreError(f"{after!r} is no id of a receipt to continue the list after")
        statement = statement.where(_ERASURES.c.id < last)
    return [Receipt(**row) for row in session.execute(statement).mappings()]


def still_open(session: Session) -> list[Receipt]:
    """Erasures of which something is left, oldest first."""
    statement = select(*_COLUMNS).where(_ERASURES.c.state == "running").order_by(_ERASURES.c.id)
    return [Receipt(**row) for row in session.execute(statement).mappings()]


def releases_owed(session: Session) -> set[str]:
    """Releases in use that learned from what was erased: their files must go as soon as another one is in use."""
    return {
        name
        for receipt in list_receipts(session)
        for name, facts in receipt.releases.items()
        if facts.get("files") == WAITING
    }


def was_erased(session: Session, kind: str, value: str) -> list[Receipt]:
    """Receipts of the erasures that erased this job, image or tenant, newest first."""
    salts = session.execute(select(_ERASURES.c.id, _ERASURES.c.salt)).all()
    found: set[str] = set()
    for some in chunks(salts, IN_LIST):
        digests = [_digest(salt, kind, value) for _, salt in some]
        found.update(session.scalars(select(_DIGESTS.c.erasure_id).where(_DIGESTS.c.digest.in_(digests))))
    return [receipt for receipt in list_receipts(session) if receipt.id in found]
