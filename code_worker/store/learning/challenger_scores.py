"""Scores of challengers beside the champion's, and how often they disagree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.orm import Session

from code_worker.store.erasure import personal
from code_worker.store.models import LabelRow, ShadowScoreRow, VerdictRow
from code_worker.store.sql import insert_new, new_id, table_of
from code_worker.types import Label, ShadowScore

_SHADOW = table_of(ShadowScoreRow)
_VERDICTS = table_of(VerdictRow)
_LABELS = table_of(LabelRow)
_PAGE: Final = 5000


@dataclass(frozen=True, slots=True)
class ShadowFilter:
    """A filter of one challenger's scores; what is None does not matter. `since` is included."""

    release: str
    since: datetime | None = None
    until: datetime | None = None
    tenant: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """A count of images of one scope by the champion's label and the challenger's.

    `shift` is the sum of the challenger's scores minus the champion's.
    """

    champion: str
    tenant: str | None
    content_type: str | None
    champion_label: Label
    label: Label
    images: int
    shift: float


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One image on which the two differ."""

    job_id: str
    revision: int
    uri: str | None
    sha256: str
    champion_head: str
    champion_score: float
    champion_label: Label
    head: str
    score: float
    label: Label


def add(session: Session, scores: Sequence[ShadowScore]) -> None:
    """Writes what a challenger said of jobs that are there; of a job, revision and release only the first counts."""
    if not scores:
        return
    there = personal.left(session, jobs=(score.job_id for score in scores)).jobs
    rows = [{"id": new_id(session), **asdict(score)} for score in scores if score.job_id in there]
    # By the unique key, as all bulk inserts: two in different orders could wait for each other.
    rows.sort(key=lambda row: (row["job_id"], row["revision"]))
    insert_new(session, ShadowScoreRow, rows, same=["job_id", "revision", "release"])


def last(session: Session) -> str | None:
    """The challenger that scored last, or None while none ever did."""
    return session.scalar(select(_SHADOW.c.release).order_by(_SHADOW.c.id.desc()).limit(1))


def tally(session: Session, wanted: ShadowFilter) -> list[Tally]:
    """Counts by champion, tenant, content type and both labels."""
    scope = (_SHADOW.c.champion, _SHADOW.c.tenant, _SHADOW.c.content_type, _SHADOW.c.champion_label, _SHADOW.c.label)
    shift = func.sum(_SHADOW.c.score - _SHADOW.c.champion_score)
    statement = select(*scope, func.count(), shift).where(*_conditions(wanted)).group_by(*scope)
    return [
        Tally(champion, tenant, content_type, Label(was), Label(now), images, float(moved))
        for champion, tenant, content_type, was, now, images, moved in session.execute(statement)
    ]


def disagreements(session: Session, wanted: ShadowFilter, *, limit: int) -> list[Disagreement]:
    """Images on which both differ most: other labels first, then by the distance of their scores."""
    other = case((_SHADOW.c.label != _SHADOW.c.champion_label, 1), else_=0)
    apart = func.abs(_SHADOW.c.score - _SHADOW.c.champion_score)
    same = (_VERDICTS.c.job_id == _SHADOW.c.job_id) & (_VERDICTS.c.revision == _SHADOW.c.revision)
    own = (_SHADOW.c[name] for name in Disagreement.__dataclass_fields__ if name != "uri")
    statement = (
        select(*own, _VERDICTS.c.uri)
        # Outer: retention may have taken the verdict of that revision; the score then has no address, and counts.
        .select_from(_SHADOW.outerjoin(_VERDICTS, same))
        .where(*_conditions(wanted), (other == 1) | (apart > 0))
        .order_by(other.desc(), apart.desc(), _SHADOW.c.id)
        .limit(limit)
    )
    return [
        Disagreement(**{**row, "label": Label(row["label"]), "champion_label": Label(row["champion_label"])})
        for row in session.execute(statement).mappings()
    ]


def labelled(session: Session, wanted: ShadowFilter) -> dict[str, tuple[Label, Label]]:
    """Returns what champion and challenger said last of each image that somebody labelled, by content hash."""
    said = select(_LABELS.c.id).where(_LABELS.c.sha256 == _SHADOW.c.sha256).exists()
    statement = (
        select(_SHADOW.c.sha256, _SHADOW.c.champion_label, _SHADOW.c.label)
        .where(*_conditions(wanted), said)
        # In the order of time: of several scores of one image the last stays in the mapping.
        .order_by(_SHADOW.c.id)
        .execution_options(yield_per=_PAGE)
    )
    return {sha256: (Label(was), Label(now)) for sha256, was, now in session.execute(statement)}


def _conditions(wanted: ShadowFilter) -> Iterator[ColumnElement[Any]]:
    yield _SHADOW.c.release == wanted.release
    if wanted.since is not None:
        yield _SHADOW.c.created_at >= wanted.since
    if wanted.until is not None:
        yield _SHADOW.c.created_at < wanted.until
    for name in ("tenant", "content_type"):
        if (value := getattr(wanted, name)) is not None:
            yield _SHADOW.c[name] == value
