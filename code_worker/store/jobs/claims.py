"""Accepting jobs, claiming them and letting go of them, under leases in the database's own time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import CursorResult, Float, and_, bindparam, case, delete, exists, or_, select, update
from sqlalchemy.orm import Session

from code_worker.errors import IdConflictError
from code_worker.store.erasure import receipts
from code_worker.store.ids import as_uuid, keyed_id, uuid7, valid_uuids
from code_worker.store.models import JobRow, VerdictRow, db_now, db_now_plus
from code_worker.store.sql import IN_LIST, among, insert_new, plain, table_of, unindexed
from code_worker.types import Job, RejectReason
from code_worker.wire import JobItem, checked_item, chunks, queue_for

ACCEPT_GRACE_S: Final = 10.0
"""How long a producer has to publish what it accepted before the sweeper does it."""
_REDELIVERED_S: Final = 30 * 86_400.0
"""How long after an erasure a message is known again of which a job was erased."""
_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to accept. Its id is fixed when it is made, so that accepting it twice is accepting it once.

    Attributes:
        again: it may have been accepted before, and erased since: its id is that of a message, which may come twice.

    Raises:
        ValueError: a field out of its limits, which are those of `JobItem`.
    """

    uri: str
    head: str | None = None
    tenant: str | None = None
    content_type: str | None = None
    priority: int = 4
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    id: str = field(default_factory=uuid7)
    again: bool = False

    def __post_init__(self) -> None:
        item = checked_item({name: getattr(self, name) for name in JobItem.model_fields})
        object.__setattr__(self, "metadata", item.metadata)
        if self.key is not None:
            object.__setattr__(self, "id", keyed_id(self.tenant, self.key))

    @classmethod
    def of(cls, fields: object, **fixed: Any) -> NewJob:
        """The job that somebody's mapping of its fields asks for; `fixed` is what the mapping may not name: an id.

        A job whose id is fixed so may come `again`.

        Raises:
            ValueError: no mapping, an unknown field, or one out of its limits.
        """
        if isinstance(fields, Mapping) and "uri" in fields and fields.keys() <= JobItem.model_fields.keys():
            return cls(**fields, **fixed, again="id" in fixed)
        checked_item(fields)
        raise AssertionError("what is no job's fields is refused")


def accepted_before(session: Session, ids: Sequence[str]) -> set[str]:
    """Returns which of these jobs are in the ledger; an id that a key makes says so of that key."""
    return {
        job_id
        for some in chunks(ids, IN_LIST)
        for job_id in session.scalars(select(_JOBS.c.id).where(among(session, _JOBS.c.id, some)))
    }


def accept(session: Session, jobs: Sequence[NewJob]) -> list[str]:
    """Writes the jobs that are not there yet and returns all ids in order; the caller publishes after commit.

    A job that came `again` after it was erased, within a month, is left out: it is the one that was meant to go.

    Raises:
        IdConflictError: a key that was used before, or twice here, for different jobs; the transaction must end.
    """
    rows: dict[str, dict[str, Any]] = {}
    for job in jobs:
        row = _values(job)
        if rows.setdefault(job.id, row)["payload_sha256"] != row["payload_sha256"]:
            raise _conflict(row)
    constants = {"due_at": db_now_plus(ACCEPT_GRACE_S)}
    # Sorted by the key: two producers with the same keys wait for each other instead of deadlocking.
    insert_new(session, JobRow, [rows[job_id] for job_id in sorted(rows)], same=["id"], constants=constants)
    # After the insert, which waited for another producer's of the same key: its row is there now to be compared with.
    _check_keyed(session, {job_id: row for job_id, row in rows.items() if row["key"] is not None})
    erased = _drop_erased(session, {job.id for job in jobs if job.again and job.key is None})
    return [job.id for job in jobs if job.id not in erased]


def _drop_erased(session: Session, job_ids: set[str]) -> set[str]:
    """Takes those back that were erased; asked last: an insert waits for an erasure that deletes the same id."""
    erased = receipts.erased_jobs(session, job_ids, within_s=_REDELIVERED_S)
    if erased:
        # Only what waits is taken back: a claim that somebody holds must find its row, and verdicts refer to theirs.
        judged = exists().where(_VERDICTS.c.job_id == _JOBS.c.id)
        waiting = (among(session, _JOBS.c.id, sorted(erased)), _JOBS.c.state == "accepted", ~judged)
        session.execute(delete(_JOBS).where(*waiting))
    return erased


def _values(job: NewJob) -> dict[str, Any]:
    return {
        "id": job.id,
        "key": job.key,
        "payload_sha256": None if job.key is None else _payload_sha256(job),
        "uri": job.uri,
        "head": job.head,
        "tenant": job.tenant,
        "content_type": job.content_type,
        "priority": job.priority,
        "queue": queue_for(job.priority),
        "metadata": job.metadata,
    }


def _payload_sha256(job: NewJob) -> str:
    fields = [job.uri, job.head, job.tenant, job.content_type, job.priority, job.metadata]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _check_keyed(session: Session, rows: Mapping[str, Mapping[str, Any]]) -> None:
    for some in chunks(rows, IN_LIST):
        written = session.execute(select(_JOBS.c.id, _JOBS.c.payload_sha256).where(among(session, _JOBS.c.id, some)))
        for job_id, payload_sha256 in written:
            if payload_sha256 != rows[job_id]["payload_sha256"]:
                raise _conflict(rows[job_id])


def _conflict(row: Mapping[str, Any]) -> IdConflictError:
    return IdConflictError(f"key {row['key']!r} of tenant {row['tenant']!r} already names another job ({row['id']})")


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
    # One statement that locks and takes: two workers with the same message cannot both read a job as free. Rows that
    # another transaction has locked are passed over (SKIP LOCKED) instead of waited for: they are being claimed, or
    # published, at this moment. SQLite has one writer at a time, and its dialect leaves FOR UPDATE out.
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
        # As a CTE, which PostgreSQL runs exactly once where it locks rows;
        # a subquery inside IN may be run again for each row of a nested loop.
        .cte("free")
    )
    statement = (
        update(_JOBS)
        .where(_JOBS.c.id.in_(select(free.c.id)))
        .values(
            # Counted when it begins: a process that dies over a job cannot count afterwards.
            state="running",
            attempts=_JOBS.c.attempts + 1,
            owner=owner,
            claimed_at=db_now(),
            due_at=db_now_plus(lease_s),
            not_before=None,
        )
        .returning(*_JOB_COLUMNS)
    )
    # RETURNING has no order of its own.
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
        # A lease under which a job is still being judged has its end in the future: its job is not due.
        .where(_JOBS.c.due_at <= db_now(), _JOBS.c.attempts >= max_attempts)
        .order_by(_JOBS.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [Job(**row._asdict()) for row in rows]


def renew(session: Session, *, owner: str, lease_s: float, ids: Sequence[str] | None = None) -> int:
    """Extends the leases that the owner still holds, of all its jobs or of some; returns how many."""
    # By ix_jobs_owner, which stays small: all that ends a claim clears its owner.
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
    # A parameter inside the expression: one statement for all delays, which the database adds to its own clock.
    later = db_now_plus(bindparam("b_delay_s", type_=Float()))
    statement = (
        update(_JOBS)
        .where(_JOBS.c.id == bindparam("b_id"), _JOBS.c.state == "running", *mine)
        .values(
            state="accepted",
            # The worker lives, so this job has killed nobody, and must not come nearer to quarantine.
            attempts=case((_JOBS.c.attempts > 0, _JOBS.c.attempts - 1), else_=0),
            faults=_JOBS.c.faults + bindparam("b_blame"),
            last_fault=bindparam("b_fault"),
            # Due when the wait is over, and without a message: the sweeper then publishes it.
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
        # In the order in which all statements lock jobs.
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
