"""Jobs that must be published, again or for the first time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from sqlalchemy import ColumnElement, and_, false, not_, or_, select, update
from sqlalchemy.orm import Session

from code_worker.store.ids import valid_uuids
from code_worker.store.models import JobRow, db_now, db_now_plus, time_plus
from code_worker.store.sql import IN_LIST, among, table_of, unindexed
from code_worker.wire import chunks

_JOBS = table_of(JobRow)
_POSTPONE: Final = 20_000
_WAIT_SAMPLE: Final = 500
_WAIT_WINDOW_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class DueJob:
    """A job to publish in a message of its queue; `attempts` over 0 means that a worker died over it."""

    id: str
    queue: str
    attempts: int


def mark_published(session: Session, ids: Sequence[str], *, wait_s: float = 60.0) -> None:
    """Notes that these jobs were published; the sweeper looks again after `wait_s`. Claimed ones are left alone."""
    for some in chunks(sorted(valid_uuids(ids)), IN_LIST):
        session.execute(
            update(_JOBS)
            .where(among(session, _JOBS.c.id, some), unindexed(_JOBS.c.state) == "accepted")
            .values(published_at=db_now(), due_at=db_now_plus(wait_s))
        )


def due(session: Session, *, limit: int, min_wait_s: Mapping[str, float]) -> list[DueJob]:
    """Jobs to publish, longest due first, locked until commit.

    What was published less than its queue's wait ago is put off instead: a long queue is not published twice.
    Running jobs whose lease lapsed become accepted. All stay due until `mark_published`: should the caller die
    before it has published, the next one finds them again.
    """
    waiting = [_still_waiting(queue, wait_s) for queue, wait_s in min_wait_s.items()]
    for queue, wait_s in min_wait_s.items():
        _put_off(session, queue, wait_s)
    rows = session.execute(
        select(_JOBS.c.id, _JOBS.c.queue, _JOBS.c.attempts, _JOBS.c.state)
        .where(_JOBS.c.due_at <= db_now(), not_(or_(false(), *waiting)))
        .order_by(_JOBS.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    lapsed = sorted(row.id for row in rows if row.state == "running")
    for some in chunks(lapsed, IN_LIST):
        session.execute(
            update(_JOBS)
            .where(among(session, _JOBS.c.id, some))
            .values(state="accepted", owner=None, published_at=None)
        )
    return [DueJob(row.id, row.queue, row.attempts) for row in rows]


def _still_waiting(queue: str, wait_s: float) -> ColumnElement[bool]:
    return and_(
        _JOBS.c.queue == queue,
        _JOBS.c.state == "accepted",
        _JOBS.c.published_at.is_not(None),
        _JOBS.c.published_at > db_now_plus(-wait_s),
    )


def _put_off(session: Session, queue: str, wait_s: float) -> None:
    early = (
        select(_JOBS.c.id)
        .where(_JOBS.c.due_at <= db_now(), _still_waiting(queue, wait_s))
        .limit(_POSTPONE)
        .with_for_update(skip_locked=True)
        .cte("early")
    )
    session.execute(
        update(_JOBS).where(_JOBS.c.id.in_(select(early.c.id))).values(due_at=time_plus(_JOBS.c.published_at, wait_s))
    )


def with_lost_messages(session: Session, queues: Sequence[str], *, older_than_s: float, limit: int) -> list[DueJob]:
    """Published, unclaimed jobs of queues whose list in the broker is empty: their messages are lost.

    Only those published more than `older_than_s` ago: a worker may hold a message that it has not claimed yet.
    """
    rows = session.execute(
        select(_JOBS.c.id, _JOBS.c.queue, _JOBS.c.attempts)
        .where(
            _JOBS.c.due_at.is_not(None),
            _JOBS.c.queue.in_(queues),
            _JOBS.c.published_at <= db_now_plus(-older_than_s),
            _JOBS.c.state == "accepted",
        )
        .order_by(_JOBS.c.published_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [DueJob(row.id, row.queue, row.attempts) for row in rows]


def unpublish(session: Session, *, limit: int) -> int:
    """The broker lost its messages: makes some published, unclaimed jobs due again; returns how many.

    Called again until it returns 0, so that no transaction grows with the backlog.
    """
    lost = (
        select(_JOBS.c.id)
        .where(_JOBS.c.due_at.is_not(None), _JOBS.c.published_at.is_not(None), _JOBS.c.state == "accepted")
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("lost")
    )
    statement = update(_JOBS).where(_JOBS.c.id.in_(select(lost.c.id))).values(published_at=None, due_at=db_now())
    return len(session.execute(statement.returning(_JOBS.c.id)).all())


def queue_wait_s(session: Session, queue: str) -> float | None:
    """99th percentile of the seconds from publishing to claim, of up to 500 claims in the last ten minutes."""
    rows = session.execute(
        select(_JOBS.c.claimed_at, _JOBS.c.published_at)
        .where(
            _JOBS.c.queue == queue,
            _JOBS.c.claimed_at > db_now_plus(-_WAIT_WINDOW_S),
            _JOBS.c.published_at.is_not(None),
        )
        .order_by(_JOBS.c.claimed_at.desc())
        .limit(_WAIT_SAMPLE)
    )
    waits = sorted((claimed - published).total_seconds() for claimed, published in rows)
    return max(0.0, waits[ceil(len(waits) * 0.99) - 1]) if waits else None
