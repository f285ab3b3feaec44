"""Verdicts in the ledger: written once, never changed, read page by page, judged anew as new revisions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import chain, groupby
from typing import Any, Final

from sqlalchemy import ColumnElement, RowMapping, and_, case, exists, func, literal, select, tuple_, update
from sqlalchemy.orm import Session

from code_worker.logs import get_logger
from code_worker.store.engine import Store
from code_worker.store.erasure import personal
from code_worker.store.ids import as_uuid
from code_worker.store.models import JobRow, VerdictRow, db_now
from code_worker.store.paging import page_after, pages, position
from code_worker.store.sql import IN_LIST, among, insert_new, new_id, plain, table_of, unindexed
from code_worker.types import ImageFacts, Job, JobState, Label, Outcome, Provenance, RejectReason, Verdict
from code_worker.wire import chunks

log = get_logger(__name__)
_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)
_NEWER = _VERDICTS.alias("newer")
_FACTS: Final = tuple(ImageFacts.__dataclass_fields__)
_PROVENANCE: Final = tuple(Provenance.__dataclass_fields__)
_MAX_DETAIL: Final = 2000


@dataclass(frozen=True, slots=True)
class VerdictFilter:
    """A filter of verdicts; what is None does not matter. `since` is included, `until` is not."""

    outcome: Outcome | None = None
    label: Label | None = None
    reason: RejectReason | None = None
    tenant: str | None = None
    content_type: str | None = None
    release: str | None = None
    head: str | None = None
    sha256: str | None = None
    uri_prefix: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    score_min: float | None = None
    score_max: float | None = None
    live_only: bool = True


_EQUAL: Final = ("outcome", "label", "reason", "tenant", "content_type", "release", "head", "sha256")


def write(session: Session, verdicts: Sequence[Verdict]) -> list[str]:
    """Writes verdicts and finishes their jobs; a job that has a verdict of that revision keeps it.

    A verdict whose job is gone is left out and logged: it was erased while a worker had it, or retention took it.
    So is one of an image that an erasure named by its hash while it was judged; its job is left unfinished. The
    verdicts beside it are written.

    Returns the ids of the jobs whose verdict is the one given, in the order given; with ids made outside the
    transaction also when it is repeated after a commit whose answer was lost.
    """
    if not verdicts:
        return []
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    # Holds these rows (KEY SHARE) until commit: no erasure can delete one between this look and the insert.
    there = personal.left(session, jobs=(verdict.job_id for verdict in verdicts)).jobs
    if gone := sorted({verdict.job_id for verdict in verdicts} - there):
        log.warning("verdicts_dropped", jobs=gone, reason="their jobs were erased, or are too old to be kept")
    erased = personal.erased_while_judged(
        session,
        {verdict.job_id: verdict.sha256 for verdict in verdicts if verdict.sha256 and verdict.job_id in there},
    )
    if erased:
        log.warning("verdicts_dropped", jobs=sorted(erased), reason="their image was erased while it was judged")
    for verdict in verdicts:
        if verdict.job_id not in there or verdict.job_id in erased:
            continue
        rows.setdefault((verdict.job_id, verdict.revision), _values(verdict, verdict.id or new_id(session)))
    # Sorted by the unique key: two that judged the same jobs wait for each other instead of deadlocking.
    in_order = [rows[key] for key in sorted(rows)]
    written = insert_new(session, VerdictRow, in_order, same=["job_id", "revision"], fresh="id")
    _finish(session, sorted({job_id for job_id, _ in rows}))
    return [row["job_id"] for row in rows.values() if row["id"] in written]


def _finish(session: Session, job_ids: Sequence[str]) -> None:
    for some in chunks(job_ids, IN_LIST):
        session.execute(
            update(_JOBS)
            .where(
                among(session, _JOBS.c.id, some),
                # Accepted ones as well, of any owner: a lease that
                # lapsed while its image was judged spoils no verdict.
                unindexed(_JOBS.c.state).in_(("accepted", "running")),
                _VERDICTS.c.job_id == _JOBS.c.id,
                # By the verdict that is there, ours or another's: no job with a verdict may stay unfinished.
                _VERDICTS.c.revision == _JOBS.c.revision,
            )
            .values(
                state=case((_VERDICTS.c.reason == RejectReason.QUARANTINED.value, "quarantined"), else_="done"),
                finished_at=db_now(),
                due_at=None,
                not_before=None,
                owner=None,
            )
        )


def _values(verdict: Verdict, verdict_id: str) -> dict[str, Any]:
    facts, provenance = verdict.facts, verdict.provenance
    return {
        "id": verdict_id,
        "job_id": verdict.job_id,
        "revision": verdict.revision,
        "outcome": verdict.outcome.value,
        "label": verdict.label and verdict.label.value,
        "score": verdict.score,
        "reason": verdict.reason and verdict.reason.value,
        "detail": plain(verdict.detail, _MAX_DETAIL),
        "uri": verdict.uri,
        "tenant": verdict.tenant,
        "content_type": verdict.content_type,
        "metadata": dict(verdict.metadata),
        "timings_ms": dict(verdict.timings_ms),
        "supersedes": verdict.supersedes,
        **{name: getattr(facts, name, None) for name in _FACTS},
        **{name: getattr(provenance, name) for name in _PROVENANCE},
    }


def from_row(value: RowMapping) -> Verdict:
    """The verdict in a row that has every column of the table."""
    return Verdict(
        id=value["id"],
        job_id=value["job_id"],
        revision=value["revision"],
        outcome=Outcome(value["outcome"]),
        label=value["label"] and Label(value["label"]),
        score=value["score"],
        reason=value["reason"] and RejectReason(value["reason"]),
        detail=value["detail"],
        uri=value["uri"],
        tenant=value["tenant"],
        content_type=value["content_type"],
        metadata=value["metadata"],
        timings_ms=value["timings_ms"],
        supersedes=value["supersedes"],
        created_at=value["created_at"],
        facts=None if value["sha256"] is None else ImageFacts(**{name: value[name] for name in _FACTS}),
        provenance=Provenance(**{name: value[name] for name in _PROVENANCE}),
    )


def live(session: Session, job_id: str) -> Verdict | None:
    """The job's verdict of the highest revision, or None while there is none."""
    if (known := as_uuid(job_id)) is None:
        return None
    statement = select(_VERDICTS).where(_VERDICTS.c.job_id == known).order_by(_VERDICTS.c.revision.desc()).limit(1)
    row = session.execute(statement).mappings().one_or_none()
    return None if row is None else from_row(row)


def get(session: Session, verdict_id: str) -> Verdict | None:
    """One verdict by its own id, live or superseded, or None."""
    if (known := as_uuid(verdict_id)) is None:
        return None
    row = session.execute(select(_VERDICTS).where(_VERDICTS.c.id == known)).mappings().one_or_none()
    return None if row is None else from_row(row)


def any_given(session: Session) -> bool:
    """Returns whether any job has ever had a verdict that is still kept."""
    return session.execute(select(_VERDICTS.c.id).limit(1)).first() is not None


def list_verdicts(
    session: Session,
    wanted: VerdictFilter | None = None,
    *,
    after: str | None = None,
    limit: int,
    newest_first: bool = True,
) -> list[Verdict]:
    """A page in the order of ids, which is that of time; `after` is the id of the last verdict of the page before.

    Raises:
        StoreError: `after` is no id.
    """
    statement = select(_VERDICTS).where(*_conditions(wanted or VerdictFilter()))
    last = position(after, "verdict")
    statement = page_after(statement, [_VERDICTS.c.id], last, limit=limit, newest_first=newest_first)
    return [from_row(row) for row in session.execute(statement).mappings()]


def stream(
    store: Store, wanted: VerdictFilter | None = None, *, newest_first: bool = False, page: int = 1000
) -> Iterator[Verdict]:
    """Every verdict asked for, in constant memory; a transaction per page."""

    def read(after: str | None) -> list[Verdict]:
        one = partial(list_verdicts, wanted=wanted, after=after, limit=page, newest_first=newest_first)
        return store.run(one, write=False)

    return chain.from_iterable(pages(read, lambda verdict: verdict.id, None, size=page))


def _conditions(wanted: VerdictFilter) -> Iterator[Any]:
    table = _VERDICTS.c
    for name in _EQUAL:
        if (value := getattr(wanted, name)) is not None:
            yield table[name] == value
    if wanted.uri_prefix:
        # Not LIKE: SQLite's ignores case.
        yield func.substr(table.uri, 1, len(wanted.uri_prefix)) == wanted.uri_prefix
    if wanted.since is not None:
        yield table.created_at >= wanted.since
    if wanted.until is not None:
        yield table.created_at < wanted.until
    if wanted.score_min is not None:
        yield table.score >= wanted.score_min
    if wanted.score_max is not None:
        yield table.score <= wanted.score_max
    # Answered by the unique constraint on job and revision.
    if wanted.live_only:
        yield ~exists().where(_NEWER.c.job_id == table.job_id, _NEWER.c.revision > table.revision)


Position = tuple[datetime, str]
"""Where a page ends: when its last job was accepted, and that job's id."""
_OF_JOB: Final = ("head", "priority", "key", "state", "created_at", "id")


@dataclass(frozen=True, slots=True)
class RescoreFilter:
    """A filter of jobs, accepted from `since` on and before `until`; what is None does not matter.

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
    # Outer join: a job without a live verdict takes its place
    # in the page, so that the page after it begins further on.
    live = and_(_VERDICTS.c.job_id == _JOBS.c.id, _VERDICTS.c.revision == _JOBS.c.revision)
    statement = (
        select(_VERDICTS, *(_JOBS.c[name].label(f"job_{name}_") for name in _OF_JOB))
        .select_from(_JOBS.outerjoin(_VERDICTS, live))
        .where(*_rescore_conditions(wanted, after))
        .order_by(_JOBS.c.created_at, _JOBS.c.id)
        .limit(limit)
    )
    rows = session.execute(statement).mappings().all()
    last = (rows[-1]["job_created_at_"], rows[-1]["job_id_"]) if len(rows) == limit else None
    return Page([_pair(row) for row in rows if _matches(row, wanted)], last)


def _rescore_conditions(wanted: RescoreFilter, after: Position | None) -> Iterator[ColumnElement[Any]]:
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
    verdict = from_row(row)
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
    # First the jobs' rows are moved on and locked by it; a retry that comes now finds the new revision.
    for revision, some in groupby(sorted(new, key=_order), key=lambda verdict: verdict.revision):
        for ids in chunks((verdict.job_id for verdict in some), IN_LIST):
            free.update(session.scalars(_next_revision(ids, revision)))
    write(session, [verdict for verdict in new if verdict.job_id in free])
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
