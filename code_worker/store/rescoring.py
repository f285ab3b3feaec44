"""Judging history again: which verdicts there are to look at, and how new ones take their place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, Final

from sqlalchemy import ColumnElement, RowMapping, and_, literal, select, tuple_, update
from sqlalchemy.orm import Session

from code_worker.queues import chunks
from code_worker.store import verdicts
from code_worker.store.models import JobRow, VerdictRow
from code_worker.store.sql import IN_LIST, table_of
from code_worker.types import Job, JobState, Label, Outcome, Verdict

__all__ = ["Page", "Position", "RescoreFilter", "page", "replace_live"]

_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)
Position = tuple[datetime, str]
"""Where a page ends: when its last job was accepted, and that job's id."""
_OF_JOB: Final = ("head", "priority", "key", "state", "created_at", "id")


@dataclass(frozen=True, slots=True)
class RescoreFilter:
    """Which jobs to look at: accepted from `since` on and before `until`; what is None does not matter.

    By the time of acceptance, not of the verdict, so that judging again does not change what is found.
    """

    since: datetime
    until: datetime | None = None
    tenant: str | None = None
    label: Label | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Finished jobs with their live verdicts, all of them judged; each job's revision is the next verdict's.

    Attributes:
        judged: what there is to judge again.
        last: where the next page begins; None after the last one.
    """

    judged: list[tuple[Job, Verdict]]
    last: Position | None


def page(session: Session, wanted: RescoreFilter, *, after: Position | None = None, limit: int) -> Page:
    """The next jobs in the order of acceptance; what does not match is left out of the page, not searched past.

    A page thus costs the same however rare the matches are.
    """
    live = and_(_VERDICTS.c.job_id == _JOBS.c.id, _VERDICTS.c.revision == _JOBS.c.revision)
    statement = (
        select(_VERDICTS, *(_JOBS.c[name].label(f"job_{name}_") for name in _OF_JOB))
        .select_from(_JOBS.outerjoin(_VERDICTS, live))
        .where(*_conditions(wanted, after))
        .order_by(_JOBS.c.created_at, _JOBS.c.id)
        .limit(limit)
    )
    rows = session.execute(statement).mappings().all()
    last = (rows[-1]["job_created_at_"], rows[-1]["job_id_"]) if len(rows) == limit else None
    return Page([_pair(row) for row in rows if _matches(row, wanted)], last)


def _conditions(wanted: RescoreFilter, after: Position | None) -> Iterator[ColumnElement[Any]]:
    yield _JOBS.c.created_at >= wanted.since
    if wanted.until is not None:
        yield _JOBS.c.created_at < wanted.until
    if wanted.tenant is not None:
        yield _JOBS.c.tenant == wanted.tenant
    if after is not None:
        at, job_id = after
        yield tuple_(_JOBS.c.created_at, _JOBS.c.id) > tuple_(
            literal(at, _JOBS.c.created_at.type), literal(job_id, _JOBS.c.id.type)
        )


def _matches(row: RowMapping, wanted: RescoreFilter) -> bool:
    if row["job_state_"] != JobState.DONE or row["outcome"] != Outcome.JUDGED or row["sha256"] is None:
        return False
    return wanted.label is None or row["label"] == wanted.label


def _pair(row: RowMapping) -> tuple[Job, Verdict]:
    verdict = verdicts.from_row(row)
    job = Job(
        id=verdict.job_id,
        uri=verdict.uri,
        head=row["job_head_"],
        tenant=verdict.tenant,
        content_type=verdict.content_type,
        priority=row["job_priority_"],
        metadata=verdict.metadata,
        key=row["job_key_"],
        revision=verdict.revision + 1,
    )
    return job, verdict


def replace_live(session: Session, new: Sequence[Verdict]) -> Collection[str]:
    """Writes verdicts of the next revision for finished jobs; the jobs stay finished, the old verdicts stay as well.

    A job that was retried, or judged again by somebody else, since its verdict was read is left alone.

    Args:
        session: the unit of work.
        new: verdicts with ids of their own, made outside, so that a transaction that runs twice writes them once.

    Returns:
        Ids of the jobs whose live verdict is now one of `new`.
    """
    free: set[str] = set()
    for revision, some in groupby(sorted(new, key=_order), key=lambda verdict: verdict.revision):
        for ids in chunks((verdict.job_id for verdict in some), IN_LIST):
            free.update(session.scalars(_next_revision(ids, revision)))
    verdicts.write(session, [verdict for verdict in new if verdict.job_id in free])
    # Of those as well that an earlier run of this transaction wrote and committed unheard.
    written: set[str] = set()
    for own in chunks([verdict.id for verdict in new], IN_LIST):
        written.update(session.scalars(select(_VERDICTS.c.job_id).where(_VERDICTS.c.id.in_(own))))
    return written


def _order(verdict: Verdict) -> tuple[int, str]:
    return verdict.revision, verdict.job_id


def _next_revision(ids: Sequence[str], revision: int) -> Any:
    """Takes jobs on, in one step with the look whether they may be: a retry of one waits, or comes first."""
    still = (_JOBS.c.id.in_(ids), _JOBS.c.revision == revision - 1, _JOBS.c.state == JobState.DONE.value)
    return update(_JOBS).where(*still).values(revision=revision).returning(_JOBS.c.id)
