"""The question before anything personal is written: are the jobs and images that it is about still there?

A writer asks `left` in the transaction that writes. Jobs are locked, so that an erasure waits for the writer, or the
writer finds the row gone. Images have no row of their own: an erasure leaves digests before it removes anything, and
a lock keeps its steps and the writers' transactions apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from code_worker.queues import chunks
from code_worker.store.erasures import IMAGE, RUNNING, digest
from code_worker.store.ids import valid_uuids
from code_worker.store.models import CopyToDropRow, ErasedDigestRow, ErasureRow, JobRow, db_now
from code_worker.store.sql import IN_LIST, among, table_of, unindexed

__all__ = ["Left", "erased_while_judged", "keep_out", "left", "moment"]

_JOBS = table_of(JobRow)
_ERASURES = table_of(ErasureRow)
_DIGESTS = table_of(ErasedDigestRow)
_DROPS = table_of(CopyToDropRow)
_BY_HASH: Final = "sha256"
"""Scope of an erasure that was asked for by an image's hash."""
_LOCK: Final = 0x636F6465_65726173
"""Key of PostgreSQL's advisory lock: "codeeras". Taken before the audit's, never after it."""


@dataclass(frozen=True, slots=True)
class Left:
    """Those of the jobs and images asked for about which something may be written."""

    jobs: frozenset[str]
    images: frozenset[str]


def left(
    session: Session, *, jobs: Iterable[str] = (), images: Iterable[str] = (), since: datetime | None = None
) -> Left:
    """Which of these jobs and images are not erased; until the transaction ends, none of them will be.

    Args:
        session: a unit of work that writes; ask before the first write.
        jobs: ids; those without a row were erased, or are too old to be kept.
        images: content hashes.
        since: when the writer began to read these images (see `moment`): what was erased since is not left. What is
            being erased now never is.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock_shared(_LOCK)))
    wanted = frozenset(images)
    return Left(_present(session, valid_uuids(jobs)), wanted - _erased(session, wanted, since))


def erased_while_judged(session: Session, judged: Mapping[str, str]) -> set[str]:
    """Unfinished jobs whose image an erasure named by its hash since they were claimed.

    Other erasures go by jobs, and spare an image that another job judges.

    Args:
        session: a unit of work that has asked whether the jobs are `left`.
        judged: by job id the content hash of what was judged.
    """
    found: set[str] = set()
    for some in chunks(sorted(judged), IN_LIST):
        mine = (among(session, _JOBS.c.id, some), unindexed(_JOBS.c.state).in_(("accepted", "running")))
        since = select(func.min(_JOBS.c.claimed_at)).where(*mine).scalar_subquery()
        erased = _erased_by(session, {judged[job_id] for job_id in some}, since, _ERASURES.c.scope == _BY_HASH)
        if hit := [job_id for job_id in some if judged[job_id] in erased]:
            found.update(session.scalars(select(_JOBS.c.id).where(*mine, among(session, _JOBS.c.id, hit))))
    return found


def keep_out(session: Session) -> None:
    """Waits for every writer that asked, and lets no other ask until the transaction ends."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_LOCK)))


def moment(session: Session) -> datetime:
    """The database's time, for `left`'s `since`: to be taken before the first image is read."""
    now: datetime | None = session.scalar(select(db_now()))
    assert now is not None  # noqa: S101 - the database knows the time
    return now


def _present(session: Session, ids: Collection[str]) -> frozenset[str]:
    found: set[str] = set()
    for some in chunks(sorted(ids), IN_LIST):
        held = select(_JOBS.c.id).where(among(session, _JOBS.c.id, some)).order_by(_JOBS.c.id)
        # Enough to hold up a DELETE; claims and renewals go on beside it.
        found.update(session.scalars(held.with_for_update(read=True, key_share=True)))
    return frozenset(found)


def _erased(session: Session, hashes: Collection[str], since: datetime | None) -> set[str]:
    if not hashes:
        return set()
    found: set[str] = set()
    for some in chunks(sorted(hashes), IN_LIST):
        found.update(session.scalars(select(_DROPS.c.sha256).where(_DROPS.c.sha256.in_(some))))
    return found | _erased_by(session, hashes, since)


def _erased_by(session: Session, hashes: Collection[str], since: Any, *which: ColumnElement[bool]) -> set[str]:
    """Those of the images that an erasure under way erases, or one that ended `since`."""
    found: set[str] = set()
    salted = select(_ERASURES.c.id, _ERASURES.c.salt).where(*which)
    # Two questions, each with an index: nobody looks at all the receipts that there ever were.
    salts = [*session.execute(salted.where(RUNNING))]
    if since is not None:
        salts += session.execute(salted.where(_ERASURES.c.finished_at >= since))
    for erasure_id, salt in salts:
        named = {digest(salt, IMAGE, sha256): sha256 for sha256 in hashes}
        for some in chunks(sorted(named), IN_LIST):
            mine = (_DIGESTS.c.erasure_id == erasure_id, _DIGESTS.c.digest.in_(some))
            found.update(named[one] for one in session.scalars(select(_DIGESTS.c.digest).where(*mine)))
    return found
