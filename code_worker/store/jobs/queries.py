"""Jobs that are due to be published, lists of jobs, and jobs that are judged again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    RowMapping,
    Select,
    and_,
    false,
    func,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.store.ids import as_uuid, uuid7_floor, valid_uuids
from code_worker.store.jobs.claims import ACCEPT_GRACE_S
from code_worker.store.models import JobRow, VerdictRow, db_now, db_now_plus, time_plus
from code_worker.store.paging import page_after
from code_worker.store.sql import IN_LIST, among, table_of, unindexed
from code_worker.types import JobState, RejectReason
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
    # The state is asked for, since `due_at` of a running job is
    # the end of its lease. Sorted, as for all locks on jobs.
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
    # Before the look: jobs that only wait would otherwise fill the page, and those behind them would never be seen.
    for queue, wait_s in min_wait_s.items():
        _put_off(session, queue, wait_s)
    rows = session.execute(
        select(_JOBS.c.id, _JOBS.c.queue, _JOBS.c.attempts, _JOBS.c.state)
        # `false()` stands for the empty list: or_() of nothing is no expression.
        .where(_JOBS.c.due_at <= db_now(), not_(or_(false(), *waiting)))
        .order_by(_JOBS.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    # Sorted, as all statements lock jobs: two transactions in different orders could wait for each other.
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
        # Asked beside `IS NOT NULL`: a comparison with NULL is NULL, and so is
        # its negation in `due`, which would leave out what was never published.
        _JOBS.c.published_at > db_now_plus(-wait_s),
    )


def _put_off(session: Session, queue: str, wait_s: float) -> None:
    early = (
        select(_JOBS.c.id)
        .where(_JOBS.c.due_at <= db_now(), _still_waiting(queue, wait_s))
        # Bounded, so that no transaction grows with the backlog; the next pass puts off the rest.
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
            # `due_at` is repeated above for the planner: a partial index serves only what implies its condition.
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
    # The nearest-rank percentile: a wait that was seen, and no value between two.
    waits = sorted((claimed - published).total_seconds() for claimed, published in rows)
    return max(0.0, waits[ceil(len(waits) * 0.99) - 1]) if waits else None


_VERDICTS = table_of(VerdictRow)
_CLOCKS_DIFFER: Final = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class JobInfo:
    """Everything the ledger knows of one job; times in UTC."""

    id: str
    uri: str
    state: JobState
    head: str | None
    tenant: str | None
    content_type: str | None
    priority: int
    queue: str
    metadata: Mapping[str, Any]
    key: str | None
    attempts: int
    faults: int
    revision: int
    owner: str | None
    last_fault: str | None
    created_at: datetime
    due_at: datetime | None
    not_before: datetime | None
    published_at: datetime | None
    claimed_at: datetime | None
    finished_at: datetime | None
    retried_at: datetime | None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """A filter of jobs; what is None does not matter."""

    state: JobState | None = None
    tenant: str | None = None
    queue: str | None = None
    uri: str | None = None


_COLUMNS = tuple(_JOBS.c[name] for name in JobInfo.__dataclass_fields__)


def _info(row: RowMapping) -> JobInfo:
    return JobInfo(**{**row, "state": JobState(row["state"])})


def get(session: Session, job_id: str) -> JobInfo | None:
    """One job, or None."""
    if (known := as_uuid(job_id)) is None:
        return None
    row = session.execute(select(*_COLUMNS).where(_JOBS.c.id == known)).mappings().one_or_none()
    return None if row is None else _info(row)


def list_jobs(
    session: Session,
    wanted: JobFilter | None = None,
    *,
    after: str | None = None,
    limit: int,
    newest_first: bool = True,
) -> list[JobInfo]:
    """A page in the order of acceptance, after the job `after` of the page before.

    Raises:
        StoreError: `after` names no job.
    """
    statement = _filtered(select(*_COLUMNS), wanted or JobFilter())
    by = (_JOBS.c.created_at, _JOBS.c.id)
    last = None if after is None else _position(session, after)
    statement = page_after(statement, by, last, limit=limit, newest_first=newest_first)
    return [_info(row) for row in session.execute(statement).mappings()]


def _position(session: Session, job_id: str) -> tuple[datetime, str]:
    job = get(session, job_id)
    if job is None:
        raise StoreError(f"no job {job_id} to continue the list after")
    return job.created_at, job.id


def _filtered(statement: Select[Any], wanted: JobFilter) -> Select[Any]:
    for name in JobFilter.__dataclass_fields__:
        if (value := getattr(wanted, name)) is not None:
            statement = statement.where(_JOBS.c[name] == value)
    return statement


def counts(session: Session, *, finished: bool = True) -> dict[JobState, int]:
    """Jobs by state, every state named. Finished ones are many: without them the answer is quick at any size."""
    statement = select(_JOBS.c.state, func.count()).group_by(_JOBS.c.state)
    if not finished:
        statement = statement.where(_JOBS.c.due_at.is_not(None))
    found = {JobState(state): number for state, number in session.execute(statement)}
    return {state: found.get(state, 0) for state in JobState}


def waiting(session: Session) -> dict[str, tuple[int, float]]:
    """By queue, how many published jobs no worker has claimed, and the seconds for which the oldest has waited."""
    rows = session.execute(
        # The aggregate of a constant: the database's time beside the groups, without a second question.
        select(_JOBS.c.queue, func.count(), func.min(_JOBS.c.published_at), func.max(db_now()))
        .where(_JOBS.c.due_at.is_not(None), unindexed(_JOBS.c.state) == "accepted", _JOBS.c.published_at.is_not(None))
        .group_by(_JOBS.c.queue)
    )
    return {queue: (number, max(0.0, (now - first).total_seconds())) for queue, number, first, now in rows}


def unpublished(session: Session) -> tuple[int, float]:
    """Returns how many jobs are due for a message and have none, and for how many seconds the first of them has been.

    The sweeper publishes them at its next pass; those that wait for another attempt are due later.
    """
    number, first, now = session.execute(
        select(func.count(), func.min(_JOBS.c.due_at), func.max(db_now())).where(
            _JOBS.c.due_at <= db_now(), unindexed(_JOBS.c.state) == "accepted", _JOBS.c.published_at.is_(None)
        )
    ).one()
    return number, 0.0 if first is None else max(0.0, (now - first).total_seconds())


def oldest_unfinished_s(session: Session) -> float | None:
    """Age of the job that waits longest for a verdict; what an alarm should watch. None when there is none.

    Of a job that is judged again the age counts from the retry. Reads every unfinished job, as `counts` does.
    """
    since = func.min(func.coalesce(_JOBS.c.retried_at, _JOBS.c.created_at))
    first, now = session.execute(select(since, db_now()).where(_JOBS.c.due_at.is_not(None))).one()
    return None if first is None else max(0.0, (now - first).total_seconds())


def retry(session: Session, ids: Sequence[str]) -> list[str]:
    """Finished and quarantined jobs are accepted again, for a verdict of the next revision; others are left alone.

    Returns the ids that are to be published, in the order given.
    """
    again: set[str] = set()
    wanted = valid_uuids(ids)
    for some in chunks(sorted(wanted), IN_LIST):
        statement = (
            update(_JOBS)
            # Finished ⇔ `due_at` is null, by a check constraint. Asked
            # in the UPDATE: of two that retry it, one moves it on.
            .where(among(session, _JOBS.c.id, some), _JOBS.c.due_at.is_(None))
            .values(
                state="accepted",
                revision=_JOBS.c.revision + 1,
                attempts=0,
                faults=0,
                last_fault=None,
                owner=None,
                not_before=None,
                published_at=None,
                claimed_at=None,
                finished_at=None,
                retried_at=db_now(),
                due_at=db_now_plus(ACCEPT_GRACE_S),
            )
            .returning(_JOBS.c.id)
        )
        again.update(session.scalars(statement))
    return [job_id for job_id in wanted if job_id in again]


def retry_denied(session: Session, source: str, *, since: datetime, limit: int = 10_000) -> list[str]:
    """Has the jobs judged again whose live verdict, given since then, says that the source denied their image.

    Returns their ids; the sweeper publishes them.
    """
    prefix = f"{source}/"
    denied = (
        select(_VERDICTS.c.job_id)
        .join(_JOBS, (_JOBS.c.id == _VERDICTS.c.job_id) & (_JOBS.c.revision == _VERDICTS.c.revision))
        .where(
            _VERDICTS.c.reason == RejectReason.ACCESS_DENIED.value,
            # For the index; ids are in the order of time, as near as clocks agree.
            _VERDICTS.c.id >= uuid7_floor(since - _CLOCKS_DIFFER),
            _VERDICTS.c.created_at >= since,
            func.substr(_VERDICTS.c.uri, 1, len(prefix)) == prefix,
        )
        .limit(limit)
    )
    return retry(session, list(session.scalars(denied)))
