"""Accepting jobs: a committed row is the promise that there will be a verdict."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from code_worker.errors import IdConflictError
from code_worker.logs import redact
from code_worker.queues import MAX_URI_LENGTH, chunks, queue_for
from code_worker.store.ids import keyed_id, uuid7
from code_worker.store.models import JobRow, db_now_plus
from code_worker.store.sql import IN_LIST, among, insert_new, is_plain, table_of

__all__ = ["ACCEPT_GRACE_S", "NewJob", "accept", "check_new"]

ACCEPT_GRACE_S: Final = 10.0
"""How long a producer has to publish what it accepted before the sweeper does it."""
_JOBS = table_of(JobRow)
_ESCAPED_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to accept. Its id is fixed when it is made, so that accepting it twice is accepting it once."""

    uri: str
    head: str | None = None
    tenant: str | None = None
    content_type: str | None = None
    priority: int = 4
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    id: str = field(default_factory=uuid7)

    def __post_init__(self) -> None:
        if self.key is not None:
            object.__setattr__(self, "id", keyed_id(self.tenant, self.key))


def check_new(job: NewJob) -> None:
    """Refuses what a database could not store; a caller may ask per job, so that one does not spoil the others.

    Raises:
        ValueError: an empty, overlong or unstorable text, a URI with credentials, a priority outside 0 to 9, metadata
            that is not JSON.
    """
    for name in ("uri", "head", "tenant", "content_type", "key"):
        text = getattr(job, name)
        if text is not None and (len(text) > MAX_URI_LENGTH or not is_plain(text)):
            raise ValueError(f"job not accepted: {name} has over {MAX_URI_LENGTH} characters, a NUL or half of one")
    if not job.uri:
        raise ValueError("job not accepted: uri is empty")
    if redact(job.uri) != job.uri:
        raise ValueError("job not accepted: its uri carries a password or a signature, which would be kept for ever")
    if not 0 <= job.priority <= 9:
        raise ValueError(f"job not accepted: priority must be 0 to 9, not {job.priority}")
    if job.metadata:
        _check_metadata(job.metadata)


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    try:
        written = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False)
        written.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"job not accepted: metadata is not JSON: {error}") from None
    if _ESCAPED_NUL.search(written):
        raise ValueError("job not accepted: metadata holds a NUL")


def accept(session: Session, jobs: Sequence[NewJob]) -> list[str]:
    """Writes the jobs that are not there yet and returns all ids in order; the caller publishes after commit.

    Raises:
        IdConflictError: a key that was used before, or twice here, for different jobs; the transaction must end.
        ValueError: a job that cannot be stored; see `check_new`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for job in jobs:
        check_new(job)
        row = _values(job)
        if rows.setdefault(job.id, row)["payload_sha256"] != row["payload_sha256"]:
            raise _conflict(row)
    constants = {"due_at": db_now_plus(ACCEPT_GRACE_S)}
    insert_new(session, JobRow, [rows[job_id] for job_id in sorted(rows)], same=["id"], constants=constants)
    _check_keyed(session, {job_id: row for job_id, row in rows.items() if row["key"] is not None})
    return [job.id for job in jobs]


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
        "metadata": dict(job.metadata),
    }


def _payload_sha256(job: NewJob) -> str:
    fields = [job.uri, job.head, job.tenant, job.content_type, job.priority, dict(job.metadata)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _check_keyed(session: Session, rows: Mapping[str, Mapping[str, Any]]) -> None:
    for some in chunks(rows, IN_LIST):
        written = session.execute(select(_JOBS.c.id, _JOBS.c.payload_sha256).where(among(session, _JOBS.c.id, some)))
        for job_id, payload_sha256 in written:
            if payload_sha256 != rows[job_id]["payload_sha256"]:
                raise _conflict(rows[job_id])


def _conflict(row: Mapping[str, Any]) -> IdConflictError:
    return IdConflictError(f"key {row['key']!r} of tenant {row['tenant']!r} already names another job ({row['id']})")
