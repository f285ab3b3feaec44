"""Verdicts in the ledger: written once, never changed, read page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

from sqlalchemy import RowMapping, case, exists, func, select, update
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.logs import get_logger
from code_worker.queues import chunks
from code_worker.store import personal
from code_worker.store.engine import Store
from code_worker.store.ids import as_uuid
from code_worker.store.models import JobRow, VerdictRow, db_now
from code_worker.store.sql import IN_LIST, among, insert_new, new_id, plain, table_of, unindexed
from code_worker.types import ImageFacts, Label, Outcome, Provenance, RejectReason, Verdict

__all__ = ["VerdictFilter", "any_given", "from_row", "get", "list_verdicts", "live", "stream", "write"]

log = get_logger(__name__)
_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)
_NEWER = _VERDICTS.alias("newer")
_FACTS: Final = tuple(ImageFacts.__dataclass_fields__)
_PROVENANCE: Final = tuple(Provenance.__dataclass_fields__)
_MAX_DETAIL: Final = 2000


@dataclass(frozen=True, slots=True)
class VerdictFilter:
    """Which verdicts to list; what is None does not matter. `since` is included, `until` is not."""

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
                unindexed(_JOBS.c.state).in_(("accepted", "running")),
                _VERDICTS.c.job_id == _JOBS.c.id,
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
    """Whether any job has ever had a verdict that is still kept."""
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
    if after is not None:
        if (last := as_uuid(after)) is None:
            raise StoreError(f"{after!r} is no id of a verdict to continue the list after")
        statement = statement.where(_VERDICTS.c.id < last if newest_first else _VERDICTS.c.id > last)
    order = _VERDICTS.c.id.desc() if newest_first else _VERDICTS.c.id
    return [from_row(row) for row in session.execute(statement.order_by(order).limit(limit)).mappings()]


def stream(
    store: Store, wanted: VerdictFilter | None = None, *, newest_first: bool = False, page: int = 1000
) -> Iterator[Verdict]:
    """Every verdict asked for, in constant memory; a transaction per page, so that a slow reader holds none open."""
    after: str | None = None
    while True:
        read = partial(list_verdicts, wanted=wanted, after=after, limit=page, newest_first=newest_first)
        verdicts = store.run(read, write=False)
        yield from verdicts
        if len(verdicts) < page:
            return
        after = verdicts[-1].id


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
    if wanted.live_only:
        yield ~exists().where(_NEWER.c.job_id == table.job_id, _NEWER.c.revision > table.revision)
