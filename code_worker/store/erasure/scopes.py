"""Scopes of erasures: the jobs and images that one covers, and what of it others share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, exists, false, select, true, union
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.store.erasure.personal import encoders
from code_worker.store.erasure.receipts import IMAGE, JOB, TENANT, Receipt, open_with, targeted, was_erased
from code_worker.store.ids import as_uuid
from code_worker.store.models import (
    EmbeddingRow,
    ImageOriginRow,
    ImportedRow,
    JobRow,
    KeptImageRow,
    LabelRow,
    ShadowScoreRow,
    VerdictRow,
)
from code_worker.store.sql import IN_LIST, among, table_of
from code_worker.wire import chunks

_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)
_SHADOW = table_of(ShadowScoreRow)
_LABELS = table_of(LabelRow)
_LATER = _LABELS.alias("later")
_ORIGINS = table_of(ImageOriginRow)
_KEPT = table_of(KeptImageRow)
_ROWS = table_of(ImportedRow)
_EMBEDDINGS = table_of(EmbeddingRow)
_CHECK: Final = {
    JOB: "is the id right, and this the database?",
    IMAGE: "is the hash that of the file's bytes, and this the database?",
    TENANT: "is it spelt as in its jobs?",
}
_SCANNED: Final = 20_000
"""Rows looked at by one statement where no index leads to those in scope."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The scope of an erasure; exactly one of the first four is given.

    Attributes:
        job: its id; the image is forgotten as well, unless another job judged it.
        sha256: an image with every job that judged it.
        tenant: all its jobs, and their images unless other jobs judged them.
        before: everything accepted or labelled before this moment, and not spoken of since.
        until: when the erasure was asked for; what was accepted later is none of it. None: all that is there now.
    """

    job: str | None = None
    sha256: str | None = None
    tenant: str | None = None
    before: datetime | None = None
    until: datetime | None = None

    def __str__(self) -> str:
        """Returns the scope as a receipt may say it: without what it names."""
        if self.before is not None:
            return f"before {self.before.isoformat(timespec='seconds')}"
        return next((name for name in ("job", "sha256", "tenant") if getattr(self, name) is not None), "unknown")

    @property
    def is_unknown(self) -> bool:
        """True if it is that of an erasure which did not keep its own."""
        return not self.target()

    @property
    def named(self) -> tuple[str, str]:
        """The kind and the name of what is to be erased; nothing but a moment has none."""
        named = {JOB: self.job, IMAGE: self.sha256, TENANT: self.tenant}
        return next(((kind, value) for kind, value in named.items() if value is not None), ("", ""))

    def target(self) -> dict[str, str]:
        """Returns the scope as a process that resumes the erasure must know it."""
        named = {name: getattr(self, name) for name in ("job", "sha256", "tenant")}
        if self.before is not None:
            named["before"] = self.before.isoformat()
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def of(cls, target: Mapping[str, str] | None, *, until: datetime) -> Scope:
        """The scope that `target` gave; one without a target is unknown."""
        known = dict(target or {})
        before = known.pop("before", None)
        return cls(**known, before=None if before is None else datetime.fromisoformat(before), until=until)


def _of(scope: Scope, job_id: Any, tenant: Any, accepted_at: Any) -> ColumnElement[bool]:
    """Returns whether a row is of a job in scope, by columns that say so."""
    in_time = _not_after(scope, accepted_at)
    if scope.job is not None:
        return and_(job_id == as_uuid(scope.job), in_time)
    if scope.tenant is not None:
        # A negation of this means jobs without a tenant too.
        return and_(tenant.is_not_distinct_from(scope.tenant), in_time)
    if scope.before is not None:
        return and_(accepted_at < scope.before, in_time)
    return false()


def _not_after(scope: Scope, at: Any) -> ColumnElement[bool]:
    """Returns whether it was there when the erasure was asked for."""
    there: ColumnElement[bool] = true() if scope.until is None else at <= scope.until
    return there


def _jobs(scope: Scope, column: ColumnElement[Any]) -> Select[Any]:
    """Of the jobs in scope one column, not yet in any order."""
    if scope.sha256 is not None:
        judged = select(column).select_from(_VERDICTS.join(_JOBS, _JOBS.c.id == _VERDICTS.c.job_id)).distinct()
        return judged.where(_VERDICTS.c.sha256 == scope.sha256, _not_after(scope, _JOBS.c.created_at))
    if scope.tenant is not None:
        # As an equation: that is what the index is for.
        return select(column).where(_JOBS.c.tenant == scope.tenant, _not_after(scope, _JOBS.c.created_at))
    return select(column).where(_of(scope, _JOBS.c.id, _JOBS.c.tenant, _JOBS.c.created_at))


def job_page(session: Session, scope: Scope, *, after: str | None, limit: int) -> list[str]:
    """Ids of the jobs in scope, sorted, after the last one of the page before."""
    statement = _jobs(scope, _JOBS.c.id)
    if after is not None:
        statement = statement.where(_JOBS.c.id > after)
    return list(session.scalars(statement.order_by(_JOBS.c.id).limit(limit)))


def jobs_left(session: Session, scope: Scope) -> int:
    """Returns how many jobs and origins are in scope now."""
    return len(job_page(session, scope, after=None, limit=1)) + len(origin_page(session, scope, limit=1))


def accepted_since(session: Session, scope: Scope, job_ids: Collection[str]) -> set[str]:
    """Those of these ids that a job has which was accepted since the erasure was asked for: it is another job."""
    if scope.until is None:
        return set()
    found: set[str] = set()
    for some in chunks(sorted(job_ids), IN_LIST):
        # An id that a key makes is the same again after an erasure: the time alone tells the new job from the old.
        later = (among(session, _JOBS.c.id, some), _JOBS.c.created_at > scope.until)
        found.update(session.scalars(select(_JOBS.c.id).where(*later)))
    return found


def is_known(session: Session, scope: Scope) -> bool:
    """Returns whether a row is kept that is found by the scope's job, image or tenant; a moment may find nothing.

    What an erasure under way is to erase counts as kept.
    """
    if scope.before is not None or open_with(session, scope.target()) is not None:
        return True
    if job_page(session, scope, after=None, limit=1) or origin_page(session, scope, limit=1):
        return True
    if scope.tenant is not None:
        last: str | None = ""
        while last is not None:
            found, last = stray_scores(session, scope, after=last)
            if found:
                return True
        return False
    if scope.sha256 is not None:
        return _has_image(session, scope.sha256)
    named = as_uuid(scope.job or "")
    tables = (_LABELS, _SHADOW)
    return any(session.scalar(select(one.c.id).where(one.c.job_id == named).limit(1)) for one in tables)


def _has_image(session: Session, sha256: str) -> bool:
    """Returns whether a row has the hash, or may have it in a moment.

    Of a job that is being judged nobody knows it yet.
    """
    if session.scalar(select(_JOBS.c.id).where(_JOBS.c.state == "running").limit(1)) is not None:
        return True
    tables = (_VERDICTS, _LABELS, _KEPT, _SHADOW, _ROWS)
    if any(session.scalar(select(one.c.sha256).where(one.c.sha256 == sha256).limit(1)) for one in tables):
        return True
    return any(
        session.scalar(select(_EMBEDDINGS.c.sha256).where(of_encoder, _EMBEDDINGS.c.sha256 == sha256).limit(1))
        for of_encoder in (_EMBEDDINGS.c.encoder_sha256 == encoder for encoder in encoders(session))
    )


def erased_before(session: Session, scope: Scope) -> Receipt:
    """The last erasure of a job, image or tenant of which nothing is kept.

    Raises:
        StoreError: there was none; most often the name is misspelt.
    """
    kind, value = scope.named
    if receipts := was_erased(session, kind, value):
        return receipts[0]
    raise StoreError(f"nothing is kept of the {kind} {value!r}, so nothing was erased: {_CHECK[kind]}")


def origin_page(session: Session, scope: Scope, *, limit: int | None) -> list[tuple[str, str]]:
    """Content hash and job of images in scope whose job retention took."""
    columns = (_ORIGINS.c.sha256, _ORIGINS.c.job_id)
    if scope.sha256 is not None:
        mine = and_(_ORIGINS.c.sha256 == scope.sha256, _not_after(scope, _ORIGINS.c.accepted_at))
    elif scope.tenant is not None:
        mine = and_(_ORIGINS.c.tenant == scope.tenant, _not_after(scope, _ORIGINS.c.accepted_at))
    else:
        mine = _of(scope, _ORIGINS.c.job_id, _ORIGINS.c.tenant, _ORIGINS.c.accepted_at)
    return [(row.sha256, row.job_id) for row in session.execute(select(*columns).where(mine).limit(limit))]


def stray_scores(session: Session, scope: Scope, *, after: str) -> tuple[list[tuple[str, str]], str | None]:
    """Content hash and job of shadow scores in a tenant's scope, whether their job is there or not.

    A job that was accepted since is none of it, nor is what was said of it.

    Returns them with the id after which the next page begins; None after the last page.
    """
    if scope.tenant is None:
        return [], None
    scanned = select(_SHADOW.c.id).order_by(_SHADOW.c.id).limit(_SCANNED)
    if after:
        scanned = scanned.where(_SHADOW.c.id > after)
    ids = scanned.subquery()
    # Not max(): PostgreSQL has none of UUIDs before version 18.
    last = session.scalar(select(ids.c.id).order_by(ids.c.id.desc()).limit(1))
    if last is None:
        return [], None
    mine = [_SHADOW.c.id <= last, _SHADOW.c.tenant == scope.tenant, *([_SHADOW.c.id > after] if after else [])]
    # A range of the primary key, since no index leads to a tenant's scores: every statement reads a bounded part.
    mine.append(_not_after(scope, _SHADOW.c.created_at))
    rows = session.execute(select(_SHADOW.c.sha256, _SHADOW.c.job_id).where(*mine))
    return [(row.sha256, row.job_id) for row in rows], last


def images_of(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Content hashes of what was judged for these jobs, or labelled by their ids."""
    found: set[str] = set()
    for table in (_VERDICTS, _LABELS, _SHADOW, _ORIGINS):
        rows = session.scalars(select(table.c.sha256).where(among(session, table.c.job_id, job_ids)).distinct())
        found.update(sha256 for sha256 in rows if sha256 is not None)
    return found


def shared(session: Session, scope: Scope, hashes: Collection[str], *, erasure_id: str = "") -> set[str]:
    """Those of these images that a job out of scope judged too, or was labelled by: they stay.

    `erasure_id`: of the erasure, whose list of jobs stands for a scope that was not kept.
    """
    if scope.sha256 is not None:
        return set()
    found: set[str] = set()
    for some in chunks(sorted(hashes), IN_LIST):
        if scope.is_unknown:
            found.update(_shared_beside(session, some, erasure_id))
            continue
        others = ~_of(scope, _JOBS.c.id, _JOBS.c.tenant, _JOBS.c.created_at)
        for table in (_VERDICTS, _LABELS):
            joined = table.join(_JOBS, _JOBS.c.id == table.c.job_id)
            found.update(session.scalars(select(table.c.sha256).select_from(joined).where(_in(table, some), others)))
        theirs = ~_of(scope, _ORIGINS.c.job_id, _ORIGINS.c.tenant, _ORIGINS.c.accepted_at)
        found.update(session.scalars(select(_ORIGINS.c.sha256).where(_in(_ORIGINS, some), theirs)))
        if scope.before is not None:
            since = _LABELS.c.created_at >= scope.before
            found.update(session.scalars(select(_LABELS.c.sha256).where(_in(_LABELS, some), since)))
    return found


def _in(table: Any, hashes: Collection[str]) -> ColumnElement[bool]:
    found: ColumnElement[bool] = table.c.sha256.in_(hashes)
    return found


def _shared_beside(session: Session, hashes: Sequence[str], erasure_id: str) -> set[str]:
    """Images of jobs that are not on the erasure's list."""
    named = union(
        *(select(table.c.sha256, table.c.job_id).where(_in(table, hashes)) for table in (_VERDICTS, _ORIGINS))
    )
    rows = session.execute(named).all()
    mine = targeted(session, erasure_id, JOB, {row.job_id for row in rows}) if erasure_id else set()
    return {row.sha256 for row in rows if row.job_id not in mine}


def spoken_of(session: Session, before: datetime, *, after: str, limit: int) -> list[str]:
    """Images of which something was said before a moment and nothing since, by content hash."""
    later = exists().where(_LATER.c.sha256 == _LABELS.c.sha256, _LATER.c.created_at >= before)
    statement = select(_LABELS.c.sha256).distinct().where(_LABELS.c.sha256 > after, _LABELS.c.created_at < before)
    return list(session.scalars(statement.where(~later).order_by(_LABELS.c.sha256).limit(limit)))
