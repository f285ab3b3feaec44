"""Claiming jobs and letting go of them, under leases in the database's own time.

A claim adds one to `attempts`. A claim that ends in order, by a verdict or by a reported fault, takes it back; so
`attempts` counts the workers that died over a job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CursorResult, Float, and_, bindparam, case, or_, select, update
from sqlalchemy.orm import Session

from code_worker.store.ids import as_uuid, valid_uuids
from code_worker.store.models import JobRow, db_now, db_now_plus
from code_worker.store.sql import among, plain, table_of, unindexed
from code_worker.types import Job, RejectReason

__all__ = ["Fault", "attempts_of", "claim", "claimed_unheard", "exhausted", "put_back", "release_owner", "renew"]

_JOBS = table_of(JobRow)
_STATE = unindexed(_JOBS.c.state)
_JOB_COLUMNS = (
    _JOBS.c.id,
    _JOBS.c.uri,
    _JOBS.c.head,
    _JOBS.c.tenant,
    _JOBS.c.content_type,
    _JOBS.c.priority,
    _JOBS.c.metadata,
    _JOBS.c.key,
    _JOBS.c.attempts,
    _JOBS.c.faults,
    _JOBS.c.revision,
)
_MAX_FAULT_TEXT = 1000


@dataclass(frozen=True, slots=True)
class Fault:
    """A claim that ended without a verdict, through no fault of the image; `blame=False` does not count it."""

    job_id: str
    reason: RejectReason
    detail: str
    delay_s: float
    blame: bool = True


def claim(session: Session, ids: Sequence[str], *, owner: str, lease_s: float, max_attempts: int) -> list[Job]:
    """Takes those of the jobs that are free, in one statement; every other claimer gets none of them.

    Free: accepted and not told to wait, or running under a lease that lapsed. Ids that name no job, and jobs with
    `max_attempts` used up, are passed over. The jobs come in the order of `ids`.
    """
    wanted = valid_uuids(ids)
    if not wanted:
        return []
    free = (
        select(_JOBS.c.id)
        .where(
            among(session, _JOBS.c.id, wanted),
            _JOBS.c.attempts < max_attempts,
            or_(
                and_(_STATE == "accepted", or_(_JOBS.c.not_before.is_(None), _JOBS.c.not_before <= db_now())),
                and_(_STATE == "running", _JOBS.c.due_at <= db_now()),
            ),
        )
        .order_by(_JOBS.c.id)
        .with_for_update(skip_locked=True)
        .cte("free")
    )
    statement = (
        update(_JOBS)
        .where(_JOBS.c.id.in_(select(free.c.id)))
        .values(
            state="running",
            attempts=_JOBS.c.attempts + 1,
            owner=owner,
            claimed_at=db_now(),
            due_at=db_now_plus(lease_s),
            not_before=None,
        )
        .returning(*_JOB_COLUMNS)
    )
    claimed = {row.id: Job(**row._asdict()) for row in session.execute(statement)}
    return [claimed[job_id] for job_id in wanted if job_id in claimed]


def claimed_unheard(session: Session, ids: Sequence[str], *, owner: str, within_s: float) -> list[Job]:
    """Those of the jobs that the owner has claimed within so many seconds, in the order of `ids`.

    For a claim that is repeated after a commit whose answer was lost: what it took then is no longer free.
    """
    wanted = valid_uuids(ids)
    rows = session.execute(
        select(*_JOB_COLUMNS).where(
            among(session, _JOBS.c.id, wanted),
            _STATE == "running",
            _JOBS.c.owner == owner,
            _JOBS.c.claimed_at > db_now_plus(-within_s),
        )
    )
    found = {row.id: Job(**row._asdict()) for row in rows}
    return [found[job_id] for job_id in wanted if job_id in found]


def attempts_of(session: Session, ids: Sequence[str]) -> dict[str, int]:
    """Attempts so far of those of the jobs that are unfinished; more than none makes a job a suspect."""
    rows = session.execute(
        select(_JOBS.c.id, _JOBS.c.attempts).where(
            among(session, _JOBS.c.id, valid_uuids(ids)), _STATE.in_(("accepted", "running"))
        )
    )
    return {row.id: row.attempts for row in rows}


def exhausted(session: Session, *, max_attempts: int, limit: int) -> list[Job]:
    """Due jobs that used up their attempts, locked until commit: the caller writes their `quarantined` verdicts."""
    rows = session.execute(
        select(*_JOB_COLUMNS)
        .where(_JOBS.c.due_at <= db_now(), _JOBS.c.attempts >= max_attempts)
        .order_by(_JOBS.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [Job(**row._asdict()) for row in rows]


def renew(session: Session, *, owner: str, lease_s: float, ids: Sequence[str] | None = None) -> int:
    """Extends the leases that the owner still holds, of all its jobs or of some; returns how many."""
    statement = update(_JOBS).where(_JOBS.c.owner == owner, _JOBS.c.state == "running")
    if ids is not None:
        statement = statement.where(among(session, _JOBS.c.id, valid_uuids(ids)))
    return _count(session.execute(statement.values(due_at=db_now_plus(lease_s))))


def put_back(session: Session, faults: Sequence[Fault], *, owner: str | None = None) -> None:
    """Ends claims in order without a verdict: accepted again, not before the fault's delay, the attempt given back.

    With `owner`, only claims that it still holds: a job that another worker has claimed meanwhile stays with it.
    """
    if not faults:
        return
    mine = [] if owner is None else [_JOBS.c.owner == owner]
    later = db_now_plus(bindparam("b_delay_s", type_=Float()))
    statement = (
        update(_JOBS)
        .where(_JOBS.c.id == bindparam("b_id"), _JOBS.c.state == "running", *mine)
        .values(
            state="accepted",
            attempts=case((_JOBS.c.attempts > 0, _JOBS.c.attempts - 1), else_=0),
            faults=_JOBS.c.faults + bindparam("b_blame"),
            last_fault=bindparam("b_fault"),
            not_before=later,
            due_at=later,
            published_at=None,
            owner=None,
        )
    )
    session.connection().execute(statement, _fault_values(faults))


def _fault_values(faults: Iterable[Fault]) -> list[Mapping[str, Any]]:
    return [
        {
            "b_id": job_id,
            "b_delay_s": float(fault.delay_s),
            "b_blame": int(fault.blame),
            "b_fault": plain(f"{fault.reason.value}: {fault.detail}", _MAX_FAULT_TEXT),
        }
        for fault in sorted(faults, key=lambda fault: fault.job_id)
        if (job_id := as_uuid(fault.job_id)) is not None
    ]


def release_owner(session: Session, owner: str) -> int:
    """The owner's process is dead: its jobs are due at once, their attempts kept. Returns how many."""
    statement = (
        update(_JOBS)
        .where(_JOBS.c.owner == owner, _JOBS.c.state == "running")
        .values(state="accepted", owner=None, published_at=None, due_at=db_now())
    )
    return _count(session.execute(statement))


def _count(result: Any) -> int:
    assert isinstance(result, CursorResult)  # noqa: S101 - an UPDATE always gives one
    return result.rowcount
