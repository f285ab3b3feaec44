"""Accepting jobs: a committed row is the promise that there will be a verdict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from code_worker.errors import IdConflictError
from code_worker.queues import JobItem, checked_item, chunks, queue_for
from code_worker.store import erasures
from code_worker.store.ids import keyed_id, uuid7
from code_worker.store.models import JobRow, VerdictRow, db_now_plus
from code_worker.store.sql import IN_LIST, among, insert_new, table_of

__all__ = ["ACCEPT_GRACE_S", "NewJob", "accept", "accepted_before"]

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
    """Which of these jobs are in the ledger; an id that a key makes says so of that key."""
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
    insert_new(session, JobRow, [rows[job_id] for job_id in sorted(rows)], same=["id"], constants=constants)
    _check_keyed(session, {job_id: row for job_id, row in rows.items() if row["key"] is not None})
    erased = _drop_erased(session, {job.id for job in jobs if job.again and job.key is None})
    return [job.id for job in jobs if job.id not in erased]


def _drop_erased(session: Session, job_ids: set[str]) -> set[str]:
    """Takes those back that were erased; asked last: an insert waits for an erasure that deletes the same id."""
    erased = erasures.erased_jobs(session, job_ids, within_s=_REDELIVERED_S)
    if erased:
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
