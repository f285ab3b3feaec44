"""Receipts of erasures: what was erased when, why and how much, told only to those who have the original."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import unquote

from sqlalchemy import delete, null, select, text, update
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.store.ids import as_uuid
from code_worker.store.models import ErasedDigestRow, ErasureRow, ErasureTargetRow, db_now, db_now_plus
from code_worker.store.sql import IN_LIST, insert_new, plain, table_of
from code_worker.wire import chunks

JOB: Final = "job"
IMAGE: Final = "image"
ERASED: Final = "erased"
"""An image whose rows are gone; the last look asks whether anything of it came back."""
URI: Final = "uri"
"""An address, noted as a digest alone; it goes with the other notes, so that no receipt knows of it."""
TENANT: Final = "tenant"
WAITING: Final = "waiting"
"""Stands on a receipt for files of a release that are deleted once no alias points to it."""
_ERASURES = table_of(ErasureRow)
_TARGETS = table_of(ErasureTargetRow)
_DIGESTS = table_of(ErasedDigestRow)
_MAX_WHY: Final = 2000
RUNNING: Final = text("erasures.state = 'running'")
"""Literally as the partial index has it: by a parameter SQLite would not use that."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """One erasure; `finished_at` is None while something of it is left.

    Attributes:
        step: what is erased at this moment, or was when it was left.
        last_look: what the look over all tables and the storage found at the end: `rows`, `copies` and `jobs` that
            were left, and `late`, what looks before it had found and erased. None before that look, and on receipts
            of older versions.
        created_at: when it was asked for, the last time if it was asked for again while it was under way; what was
            accepted later is not erased.
    """

    id: str
    state: str
    scope: str
    by: str
    why: str
    step: str
    counts: Mapping[str, int]
    releases: Mapping[str, Mapping[str, str]]
    runs: list[str]
    last_look: Mapping[str, int] | None
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Learned:
    """Runs and releases of a receipt that learned from what was erased."""

    id: str
    releases: Mapping[str, Mapping[str, str]]
    runs: list[str]


_COLUMNS: Final = tuple(_ERASURES.c[name] for name in Receipt.__dataclass_fields__)


def new_salt() -> str:
    """Of one receipt's digests; made outside a transaction, so that a retry writes the same."""
    return secrets.token_hex(16)


def begin(
    session: Session,
    *,
    id: str,
    scope: str,
    target: Mapping[str, str],
    by: str,
    why: str,
    salt: str,
) -> None:
    """Opens a receipt; opening it again changes nothing. `target` is the scope, for a process that resumes it."""
    row = {
        "id": id,
        "state": "running",
        "scope": scope,
        "target": dict(target),
        "by": plain(by, 300),
        "why": plain(why, _MAX_WHY),
        "salt": salt,
        "counts": {},
        "releases": {},
        "runs": [],
    }
    insert_new(session, ErasureRow, [row], same=["id"])


def target_of(session: Session, erasure_id: str) -> Mapping[str, str] | None:
    """The scope of an erasure under way; None once it is done, or if a version began it that did not keep it."""
    found: Mapping[str, str] | None = session.scalar(select(_ERASURES.c.target).where(_ERASURES.c.id == erasure_id))
    return found


def ask_again(session: Session, erasure_id: str) -> None:
    """An erasure under way is asked for anew: what was accepted since it was begun is part of it."""
    session.execute(update(_ERASURES).where(_ERASURES.c.id == erasure_id, RUNNING).values(created_at=db_now()))


def enter(session: Session, erasure_id: str, step: str) -> None:
    """Notes what is erased now."""
    session.execute(update(_ERASURES).where(_ERASURES.c.id == erasure_id).values(step=step))


def add_targets(session: Session, erasure_id: str, kind: str, values: Iterable[str]) -> None:
    """Notes what is to be erased, and its digest, which stays; of addresses and tenants there is a digest alone.

    Images get theirs from `mark`, once it is known that nobody shares them.
    """
    # Each erasure has a salt of its own: digests of two receipts
    # cannot be compared, nor looked up in a list made before.
    salt, named = salt_of(session, erasure_id), sorted(set(values))
    digests = sorted(digest(salt, kind, value) for value in named)
    noted = {TENANT: [], URI: digests}.get(kind, named)
    rows = [{"erasure_id": erasure_id, "kind": kind, "value": value} for value in noted]
    insert_new(session, ErasureTargetRow, rows, same=["erasure_id", "kind", "value"])
    if kind not in {URI, IMAGE}:
        _add_digests(session, erasure_id, digests)


def mark(session: Session, erasure_id: str, hashes: Iterable[str]) -> None:
    """Says that these images are erased: nobody writes about them any more, see `personal.left`.

    Only while writers are kept out, so that what they were told holds until their transaction ends.
    """
    salt = salt_of(session, erasure_id)
    _add_digests(session, erasure_id, sorted(digest(salt, IMAGE, one) for one in hashes))


def _add_digests(session: Session, erasure_id: str, digests: Iterable[str]) -> None:
    rows = [{"erasure_id": erasure_id, "digest": one} for one in digests]
    insert_new(session, ErasedDigestRow, rows, same=["erasure_id", "digest"])


def salt_of(session: Session, erasure_id: str) -> str:
    """The salt of an erasure's digests.

    Raises:
        StoreError: there is no such erasure.
    """
    salt: str | None = session.scalar(select(_ERASURES.c.salt).where(_ERASURES.c.id == erasure_id))
    if salt is None:
        raise StoreError(f"no erasure {erasure_id}")
    return salt


def digest(salt: str, kind: str, value: str) -> str:
    """HMAC-SHA256 of kind and value; an address may be spelt with `file://`, percent-quoted, or with a version."""
    if kind == URI:
        value = value.partition("?versionId=")[0]
        value = unquote(value.removeprefix("file://localhost").removeprefix("file://"))
    # Replaced, not refused: a lone surrogate in an address must not stop an erasure.
    return hmac.new(bytes.fromhex(salt), f"{kind}\0{value}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def digests_among(session: Session, erasure_id: str, digests: Collection[str]) -> set[str]:
    """Those of the digests that are of something that this erasure erases."""
    found = targeted(session, erasure_id, URI, digests)
    for some in chunks(sorted(digests), IN_LIST):
        mine = (_DIGESTS.c.erasure_id == erasure_id, _DIGESTS.c.digest.in_(some))
        found.update(session.scalars(select(_DIGESTS.c.digest).where(*mine)))
    return found


def targets(session: Session, erasure_id: str, kind: str, *, after: str = "", limit: int) -> list[str]:
    """Returns what is still to be erased, sorted."""
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


def turn_targets(session: Session, erasure_id: str, values: Collection[str], *, was: str, now: str) -> None:
    """Notes how far these have come: they were noted as one kind, and are another now."""
    rows = [{"erasure_id": erasure_id, "kind": now, "value": value} for value in sorted(values)]
    insert_new(session, ErasureTargetRow, rows, same=["erasure_id", "kind", "value"])
    for some in chunks(sorted(values), IN_LIST):
        session.execute(_these(erasure_id, was, some, delete(_TARGETS)))


def spare(session: Session, erasure_id: str, hashes: Collection[str]) -> None:
    """These images stay, since others share them; they were not erased, so their digests go too."""
    salt = salt_of(session, erasure_id)
    for some in chunks(sorted(hashes), IN_LIST):
        session.execute(_these(erasure_id, IMAGE, some, delete(_TARGETS)))
        digests = [digest(salt, IMAGE, value) for value in some]
        session.execute(delete(_DIGESTS).where(_DIGESTS.c.erasure_id == erasure_id, _DIGESTS.c.digest.in_(digests)))


def _these(erasure_id: str, kind: str, values: Collection[str], statement: Any) -> Any:
    return statement.where(
        _TARGETS.c.erasure_id == erasure_id, _TARGETS.c.kind == kind, _TARGETS.c.value.in_(sorted(values))
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
    # Read and written back as a whole: without the lock, of two that add at once one would be lost.
    known = get(session, erasure_id, lock=True)
    if known is None:
        raise StoreError(f"no erasure {erasure_id}")
    added = {name: known.counts.get(name, 0) + count for name, count in (counts or {}).items() if count}
    session.execute(
        update(_ERASURES)
        .where(_ERASURES.c.id == erasure_id)
        .values(
            counts={**known.counts, **added},
            releases=(named := {**known.releases, **(releases or {})}),
            runs=(begun := sorted({*known.runs, *runs})),
            learned=bool(named or begun),
        )
    )


def count(session: Session, erasure_id: str, counts: Mapping[str, int]) -> None:
    """Adds to the counts of an erasure under way, in the transaction that erases what is counted.

    One that is repeated after a lost answer finds nothing more to erase, and adds nothing.
    """
    known = get(session, erasure_id, lock=True) if any(counts.values()) else None
    if known is not None and known.finished_at is None:
        note(session, erasure_id, counts=counts)


def finish(session: Session, erasure_id: str, last_look: Mapping[str, int]) -> bool:
    """Closes the receipt with what the last look found; with it goes every note of what was to be erased.

    Returns whether it was under way.
    """
    # In the transaction that closes the receipt: these rows name in clear what was to be forgotten.
    session.execute(delete(_TARGETS).where(_TARGETS.c.erasure_id == erasure_id))
    closed = (
        update(_ERASURES)
        .where(_ERASURES.c.id == erasure_id, _ERASURES.c.state == "running")
        # SQL's NULL: None in a JSON column would be written as JSON's null.
        .values(state="done", step="done", target=null(), last_look=dict(last_look), finished_at=db_now())
    )
    return session.scalar(closed.returning(_ERASURES.c.id)) is not None


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
    statement = select(*_COLUMNS).where(RUNNING).order_by(_ERASURES.c.id)
    return [Receipt(**row) for row in session.execute(statement).mappings()]


def open_with(session: Session, target: Mapping[str, str]) -> Receipt | None:
    """The erasure under way of this scope, or None."""
    return next((one for one in still_open(session) if target_of(session, one.id) == target), None)


def learned(session: Session) -> Iterator[Learned]:
    """Yields what receipts say of runs and releases, of those alone that name any."""
    columns = (_ERASURES.c[name] for name in Learned.__dataclass_fields__)
    statement = select(*columns).where(text("erasures.learned")).order_by(_ERASURES.c.id)
    return (Learned(**row) for row in session.execute(statement).mappings())


def releases_owed(session: Session) -> set[str]:
    """Releases in use that learned from what was erased: their files must go as soon as another one is in use."""
    return {
        name
        for receipt in learned(session)
        for name, facts in receipt.releases.items()
        if facts.get("files") == WAITING
    }


def erased_jobs(session: Session, job_ids: Collection[str], *, within_s: float) -> set[str]:
    """Those of these ids whose jobs an erasure erased that is under way, or ended within so many seconds."""
    if not job_ids:
        return set()
    # Each salt gives another digest of one id, so every id is
    # asked for under every late salt; hence the limit in time.
    lately = _ERASURES.c.finished_at >= db_now_plus(-within_s)
    salts = {salt for when in (RUNNING, lately) for salt in session.scalars(select(_ERASURES.c.salt).where(when))}
    named = {digest(salt, JOB, job_id): job_id for salt in salts for job_id in job_ids}
    found: set[str] = set()
    for some in chunks(sorted(named), IN_LIST):
        found.update(session.scalars(select(_DIGESTS.c.digest).where(_DIGESTS.c.digest.in_(some))))
    return {named[one] for one in found}


def was_erased(session: Session, kind: str, value: str) -> list[Receipt]:
    """Receipts of the erasures that erased this job, image or tenant, newest first."""
    salts = session.execute(select(_ERASURES.c.id, _ERASURES.c.salt)).all()
    found: set[str] = set()
    for some in chunks(salts, IN_LIST):
        digests = [digest(salt, kind, value) for _, salt in some]
        found.update(session.scalars(select(_DIGESTS.c.erasure_id).where(_DIGESTS.c.digest.in_(digests))))
    return sorted(
        (receipt for one in found if (receipt := get(session, one)) is not None),
        key=lambda receipt: receipt.id,
        reverse=True,
    )
