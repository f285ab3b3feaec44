"""The audit: a hash chain of who changed what, written in the transaction of the change, never changed or removed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any, Final

from sqlalchemy import RowMapping, delete, func, insert, select
from sqlalchemy.orm import Session

from code_worker.store.engine import Store
from code_worker.store.models import AuditRow, RemovalRow
from code_worker.store.paging import page_after, pages
from code_worker.store.sql import database_time, plain, table_of

FIRST: Final = "0" * 64
"""What stands in the first entry for the hash of the one before."""
_AUDIT = table_of(AuditRow)
_REMOVALS = table_of(RemovalRow)
_LOCK: Final = 0x636F6465_61756469
"""Key of PostgreSQL's advisory lock: "codeaudi"."""
_MAX_NAME: Final = 300
_MAX_TEXT: Final = 1000
_TELLING: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+|\b[0-9a-fA-F]{32,}\b")
_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry; `details` is the text of a JSON object, as it was hashed."""

    seq: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: str
    previous: str
    hash: str

    def digest(self) -> str:
        """Returns what `hash` must be: sha256 of the JSON list of all the other fields."""
        at = self.at.astimezone(UTC).isoformat(timespec="microseconds")
        fields = [self.seq, at, self.actor, self.action, self.subject, self.details, self.previous]
        return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """A filter of entries; what is None does not matter. `since` is included, `until` is not.

    An action that ends with a dot means all that begin so: `release.`.
    """

    actor: str | None = None
    action: str | None = None
    subject: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Flaw:
    """A place where the chain does not hold, and why."""

    seq: int
    problem: str


@dataclass(frozen=True, slots=True)
class Verified:
    """Result of a walk along the chain; `hash` is that of the last entry, to be noted elsewhere."""

    entries: int
    hash: str
    flaws: tuple[Flaw, ...]


_COLUMNS: Final = tuple(_AUDIT.c[name] for name in Entry.__dataclass_fields__)


def record(
    session: Session, *, actor: str, action: str, subject: str, details: Mapping[str, Any] | None = None
) -> Entry:
    """Adds an entry after the last one; call it only where something changed, in the transaction that changes it.

    From here to the end of the transaction no other process adds an entry: call it as late as may be. Nothing is
    ever erased from the audit, so no content hash, URI or embedding belongs in it.

    Args:
        session: a unit of work that writes.
        actor: who did it.
        action: what was done, as `noun.verb`.
        subject: to what: an id or a name.
        details: what else must be known, as JSON.

    Raises:
        ValueError: details that are not JSON.
    """
    # One writer at a time: two that read the same last entry would fork the chain, and `previous` is unique. In READ
    # COMMITTED the statement after the lock sees what its last holder committed; SQLite's BEGIN IMMEDIATE has locked.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    before = last(session)
    entry = Entry(
        seq=1 if before is None else before.seq + 1,
        at=_now(session),
        actor=plain(actor, _MAX_NAME),
        action=action,
        subject=plain(subject, _MAX_NAME),
        details=json.dumps(dict(details or {}), sort_keys=True, allow_nan=False, separators=(",", ":")),
        previous=FIRST if before is None else before.hash,
        hash="",
    )
    row = {name: getattr(entry, name) for name in Entry.__dataclass_fields__} | {"hash": entry.digest()}
    session.execute(insert(_AUDIT).values(row))
    return Entry(**row)


def blank(text: str) -> str:
    """Free text for an entry, without what may have to be erased one day: URIs and hashes become `…`."""
    return _TELLING.sub("…", plain(text, _MAX_TEXT))


def note_state(session: Session, *, actor: str, subject: str, state: Mapping[str, Any]) -> None:
    """Records a `settings.change` when the state of a subject is not the one recorded last."""
    before = last(session, action="settings.change", subject=subject)
    if before is None or json.loads(before.details) != dict(state):
        record(session, actor=actor, action="settings.change", subject=subject, details=state)


def _now(session: Session) -> datetime:
    """The time now, not that of the transaction's start, which may lie before that of the entry before."""
    # PostgreSQL's now() is fixed when the transaction begins,
    # before it waited for the lock. SQLite's is the statement's.
    postgresql = session.get_bind().dialect.name == "postgresql"
    return database_time(session, func.clock_timestamp() if postgresql else None)


@contextmanager
def removal(session: Session, entry: Entry) -> Iterator[None]:
    """Lets this transaction remove verdicts, labels, policies and the like, and rewrite snapshots, while it lasts.

    The only way past the triggers, and only with an entry of the same transaction that says who removes what and
    why. A transaction that does not come to the end of the block cannot be committed.
    """
    # `closed` refers to a row that never is there; the foreign key is deferred, so it is looked at when the
    # transaction commits: only the DELETE below, at the end of the block, lets it pass.
    session.execute(insert(_REMOVALS).values(audit_seq=entry.seq, closed=-entry.seq))
    yield
    session.execute(delete(_REMOVALS).where(_REMOVALS.c.audit_seq == entry.seq))


def last(session: Session, *, action: str | None = None, subject: str | None = None) -> Entry | None:
    """The newest entry, of an action and a subject if they are named, or None."""
    found = list_entries(session, AuditFilter(action=action, subject=subject), limit=1)
    return found[0] if found else None


def list_entries(
    session: Session,
    wanted: AuditFilter | None = None,
    *,
    after: int | None = None,
    limit: int,
    newest_first: bool = True,
) -> list[Entry]:
    """A page in the order of writing; `after` is the number of the last entry of the page before."""
    statement = select(*_COLUMNS).where(*_conditions(wanted or AuditFilter()))
    last = None if after is None else (after,)
    statement = page_after(statement, [_AUDIT.c.seq], last, limit=limit, newest_first=newest_first)
    return [_entry(row) for row in session.execute(statement).mappings()]


def _conditions(wanted: AuditFilter) -> Iterator[Any]:
    for name in ("actor", "subject"):
        if (value := getattr(wanted, name)) is not None:
            yield _AUDIT.c[name] == value
    if wanted.action is not None:
        prefix = wanted.action.endswith(".")
        # Not LIKE: SQLite's ignores case, and an underscore in an action would stand for any letter.
        named = func.substr(_AUDIT.c.action, 1, len(wanted.action)) if prefix else _AUDIT.c.action
        yield named == wanted.action
    if wanted.since is not None:
        yield _AUDIT.c.at >= wanted.since
    if wanted.until is not None:
        yield _AUDIT.c.at < wanted.until


def _entry(row: RowMapping) -> Entry:
    return Entry(**row)


def stream(store: Store, *, page: int = _PAGE) -> Iterator[Entry]:
    """Every entry, oldest first, in constant memory; a transaction per page."""

    def read(after: int | None) -> list[Entry]:
        return store.run(partial(list_entries, after=after, limit=page, newest_first=False), write=False)

    # Entries are only ever added: pages of several transactions are still one chain.
    return chain.from_iterable(pages(read, lambda entry: entry.seq, None, size=page))


def verify(store: Store, *, head: tuple[int, str] | None = None) -> Verified:
    """Walks along the chain: numbers without gaps, each hash right, each entry naming the hash of the one before.

    Entries cut off at the end leave a chain that holds, and who may write to the database can compute one anew:
    only `head`, number and hash of an entry noted elsewhere, shows that.
    """
    flaws: list[Flaw] = []
    seq, previous, sought = 0, FIRST, head
    for entry in stream(store):
        if (entry.seq, entry.hash) == sought:
            sought = None
        if entry.seq != seq + 1:
            flaws.append(Flaw(entry.seq, f"entries {seq + 1} to {entry.seq - 1} are missing"))
        if entry.previous != previous:
            flaws.append(Flaw(entry.seq, "it does not follow the entry before it"))
        if entry.digest() != entry.hash:
            flaws.append(Flaw(entry.seq, "its hash is not that of what it says"))
        seq, previous = entry.seq, entry.hash
    if sought is not None:
        flaws.append(Flaw(sought[0], "it was noted with another hash, or is missing"))
    return Verified(seq, previous, tuple(flaws))
