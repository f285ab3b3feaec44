"""The running system: who lives, who plays which role, which sources rest, what could not be read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from sqlalchemy import case, delete, or_, select, update
from sqlalchemy.orm import Session

from code_worker.logs import redact
from code_worker.store.erasure import personal
from code_worker.store.erasure.dead_letters import cut
from code_worker.store.models import (
    DeadLetterRow,
    LeaseRow,
    PluginSeenRow,
    SourcePauseRow,
    WorkerRow,
    db_now,
    db_now_plus,
)
from code_worker.store.paging import page_after, position
from code_worker.store.sql import insert_into, new_id, plain, table_of

JUDGES: Final = "worker"
"""Role of a process that judges images."""
_WORKERS = table_of(WorkerRow)
_LEASES = table_of(LeaseRow)
_PAUSES = table_of(SourcePauseRow)
_LETTERS = table_of(DeadLetterRow)
_PLUGINS = table_of(PluginSeenRow)
_MAX_BODY: Final = 64 * 1024
_MAX_TEXT: Final = 2000
_SAME_TROUBLE_S: Final = 600.0
_FORGOTTEN_AFTER_S: Final = 7 * 86_400.0


class Plugin(Protocol):
    """The record of an installed plugin."""

    @property
    def name(self) -> str:
        """Its name among plugins."""

    @property
    def version(self) -> str | None:
        """Its version, if it has one."""

    @property
    def distribution(self) -> str | None:
        """The installed package it came with, if any."""

    @property
    def hooks(self) -> Sequence[str]:
        """Hooks it implements."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker process, as it last said of itself."""

    owner: str
    host: str
    pid: int
    version: str
    release: str | None
    started_at: datetime
    seen_at: datetime
    info: Mapping[str, Any]

    @property
    def role(self) -> str:
        """Returns what it does: `worker`, `consumer`, `trainer`, `sweeper` or `beat`."""
        return str(self.info.get("role", JUDGES))


@dataclass(frozen=True, slots=True)
class SourcePause:
    """A source that is left alone until a time, `left_s` from now."""

    source: str
    until: datetime
    since: datetime
    detail: str
    left_s: float


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A broker message that could not be read."""

    id: str
    task: str
    body: str
    error: str
    at: datetime


@dataclass(frozen=True, slots=True)
class PluginSeen:
    """A plugin that a host had installed, from when to when."""

    host: str
    name: str
    version: str
    distribution: str | None
    hooks: list[str]
    first_seen: datetime
    last_seen: datetime


def beat(
    session: Session,
    owner: str,
    *,
    version: str,
    release: str | None = None,
    host: str | None = None,
    pid: int | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Says that the process `owner` lives; host and process id are this process's unless given."""
    said = {
        "host": host or socket.gethostname(),
        "pid": pid or os.getpid(),
        "version": version,
        "release": release,
        "seen_at": db_now(),
        "info": dict(info or {}),
    }
    statement = insert_into(session, WorkerRow).values(owner=owner, **said)
    session.execute(statement.on_conflict_do_update(index_elements=["owner"], set_=said))


def alive(session: Session, *, within_s: float, role: str | None = JUDGES) -> list[WorkerInfo]:
    """Processes heard of within so many seconds, longest lived first: those that judge, those of a role, or all.

    Processes of an older version, which say nothing of their role, judge.
    """
    columns = (_WORKERS.c[name] for name in WorkerInfo.__dataclass_fields__)
    rows = session.execute(
        select(*columns).where(_WORKERS.c.seen_at > db_now_plus(-within_s)).order_by(_WORKERS.c.started_at)
    )
    found = [WorkerInfo(**row) for row in rows.mappings()]
    return [one for one in found if role is None or one.role == role]


def gone(session: Session, owner: str) -> None:
    """The process ends in order: its row goes, and those that fell silent a week ago with it."""
    session.execute(
        # By the next process that ends, since a process that was killed cannot take back what it said.
        delete(_WORKERS).where(or_(_WORKERS.c.owner == owner, _WORKERS.c.seen_at < db_now_plus(-_FORGOTTEN_AFTER_S)))
    )


def take_lease(session: Session, name: str, owner: str, ttl_s: float) -> bool:
    """Takes or renews a role for `ttl_s`; False while somebody else holds it."""
    held = {"owner": owner, "until": db_now_plus(ttl_s)}
    statement = insert_into(session, LeaseRow).values(name=name, **held)
    # One statement: of two that try at once the second waits for the row and meets
    # the first one's lease. now() is that of the transaction's start, so who had
    # to wait takes a lapsed lease for a held one, never a held one for lapsed.
    free = or_(_LEASES.c.owner == owner, _LEASES.c.until <= db_now())
    taken = statement.on_conflict_do_update(index_elements=["name"], set_=held, where=free).returning(_LEASES.c.name)
    return session.scalar(taken) is not None


def renew_lease(session: Session, name: str, owner: str, ttl_s: float) -> bool:
    """Renews a role that the owner took, lapsed or not; False once another one took it, also if it was given back."""
    held = update(_LEASES).where(_LEASES.c.name == name, _LEASES.c.owner == owner).values(until=db_now_plus(ttl_s))
    return session.scalar(held.returning(_LEASES.c.name)) is not None


def lease_end(session: Session, name: str) -> datetime | None:
    """Until when somebody holds a role, as it was renewed last; None while nobody does."""
    return session.scalar(select(_LEASES.c.until).where(_LEASES.c.name == name))


def drop_lease(session: Session, name: str, owner: str) -> None:
    """Gives a role back, if the owner holds it."""
    session.execute(delete(_LEASES).where(_LEASES.c.name == name, _LEASES.c.owner == owner))


def pause_source(
    session: Session,
    source: str,
    *,
    seconds: float,
    detail: str,
    longest_s: float | None = None,
    began_s: float = 0.0,
) -> datetime:
    """Leaves a source alone for a while and returns when the trouble began.

    `detail` names no object of the source: erasure does not look here. Within ten minutes of the last pause it is the
    same trouble; a new one began `began_s` ago. With `longest_s` the pause is as long as the trouble has lasted so
    far, but not longer than that and not shorter than `seconds`.
    """
    if longest_s is not None:
        lasted = select(_PAUSES.c.since, db_now().label("now")).where(
            _PAUSES.c.source == source, _PAUSES.c.until >= db_now_plus(-_SAME_TROUBLE_S)
        )
        for since, now in session.execute(lasted):
            seconds = max(seconds, min(longest_s, (now - since).total_seconds()))
    said = {"until": db_now_plus(seconds), "detail": plain(detail, _MAX_TEXT)}
    began = db_now_plus(-began_s)
    # In DO UPDATE the table's columns are those of the row that is there already.
    since = case((_PAUSES.c.until < db_now_plus(-_SAME_TROUBLE_S), began), else_=_PAUSES.c.since)
    statement = insert_into(session, SourcePauseRow).values(source=source, since=began, **said)
    updated = statement.on_conflict_do_update(index_elements=["source"], set_={**said, "since": since})
    started: datetime = session.execute(updated.returning(_PAUSES.c.since)).scalar_one()
    return started


def blank_pauses(session: Session) -> None:
    """Blanks what an older version kept of paused sources: the object that met the trouble."""
    session.execute(update(_PAUSES).where(_PAUSES.c.detail.contains("/")).values(detail=""))


def paused_sources(session: Session, *, lately: bool = False) -> dict[str, SourcePause]:
    """Sources that rest now, by name; with `lately` also those whose trouble a success has not ended yet."""
    ends_after = db_now_plus(-_SAME_TROUBLE_S) if lately else db_now()
    query = select(_PAUSES, db_now().label("now")).where(_PAUSES.c.until > ends_after).order_by(_PAUSES.c.source)
    found: dict[str, SourcePause] = {}
    for row in session.execute(query).mappings():
        left_s = (row["until"] - row["now"]).total_seconds()
        found[row["source"]] = SourcePause(row["source"], row["until"], row["since"], row["detail"], left_s)
    return found


def resume_source(session: Session, source: str) -> datetime | None:
    """Ends the trouble of a source and returns when it began; None when there was none, or it was paused anew."""
    over = delete(_PAUSES).where(_PAUSES.c.source == source, _PAUSES.c.until <= db_now())
    return session.scalar(over.returning(_PAUSES.c.since))


def dead_letter(session: Session, *, task: str, body: str, error: str, letter_id: str | None = None) -> str:
    """Keeps a message that could not be read, without credentials and cut at 64 KiB between words; returns its id.

    With a `letter_id` made outside the transaction, one that is repeated after a lost answer keeps it once.
    """
    # A letter may say anything; an erasure under way reads it before it ends.
    personal.left(session)
    letter_id = letter_id or new_id(session)
    # Redacted before it is cut: of half a credential nobody could tell what it is. Errors quote the message.
    limits = {"body": (body, _MAX_BODY), "error": (error, _MAX_TEXT)}
    said = {name: plain(cut(redact(text), most), most) for name, (text, most) in limits.items()}
    row = {"id": letter_id, "task": task, **said}
    session.execute(insert_into(session, DeadLetterRow).on_conflict_do_nothing().values(row))
    return letter_id


def list_dead_letters(session: Session, *, after: str | None = None, limit: int = 100) -> list[DeadLetter]:
    """Unreadable messages, newest first, after the id `after` of the page before.

    Raises:
        StoreError: `after` is no id.
    """
    statement = page_after(
        select(_LETTERS), [_LETTERS.c.id], position(after, "message"), limit=limit, newest_first=True
    )
    return [DeadLetter(**row) for row in session.execute(statement).mappings()]


def saw_plugins(session: Session, plugins: Iterable[Plugin], *, host: str | None = None) -> None:
    """Records which plugins this host (or `host`) has, with the time."""
    # In one order: all processes of a host write the same rows when they start.
    for plugin in sorted(plugins, key=lambda plugin: plugin.name):
        said = {"distribution": plugin.distribution, "hooks": list(plugin.hooks), "last_seen": db_now()}
        statement = insert_into(session, PluginSeenRow).values(
            host=host or socket.gethostname(), name=plugin.name, version=plugin.version or "", **said
        )
        session.execute(statement.on_conflict_do_update(index_elements=["host", "name", "version"], set_=said))


def plugins_seen(session: Session) -> list[PluginSeen]:
    """Every plugin that any host ever had, latest first."""
    rows = session.execute(select(_PLUGINS).order_by(_PLUGINS.c.last_seen.desc(), _PLUGINS.c.host, _PLUGINS.c.name))
    return [PluginSeen(**row) for row in rows.mappings()]
