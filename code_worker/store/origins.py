"""Whose image it was, once its job is gone while something of the image is kept: so that erasure finds it still."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, delete, exists, func, literal, or_, select, union
from sqlalchemy.orm import Session

from code_worker.queues import chunks
from code_worker.store.models import EmbeddingRow, ImageOriginRow, JobRow, KeptImageRow, LabelRow, VerdictRow
from code_worker.store.sql import IN_LIST, among, insert_into, table_of

__all__ = ["encoders", "forget_origins", "note_labelled", "note_origins"]

_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)
_LABELS = table_of(LabelRow)
_KEPT = table_of(KeptImageRow)
_EMBEDDINGS = table_of(EmbeddingRow)
_ORIGINS = table_of(ImageOriginRow)
_COLUMNS: Final = ["sha256", "job_id", "tenant", "accepted_at"]


def note_origins(session: Session, job_ids: Sequence[str], *, but: str = "") -> None:
    """Notes which images these jobs judged or were labelled by, of which something is kept; before they are deleted.

    `but`: an image of which nothing will be kept.
    """
    known = list(encoders(session))
    for some in chunks(job_ids, IN_LIST):
        named = union(
            *(
                select(table.c.sha256, table.c.job_id).where(among(session, table.c.job_id, some))
                for table in (_VERDICTS, _LABELS)
            )
        ).subquery()
        found = (
            select(named.c.sha256, named.c.job_id, _JOBS.c.tenant, _JOBS.c.created_at)
            .select_from(named.join(_JOBS, _JOBS.c.id == named.c.job_id))
            .where(named.c.sha256.is_not(None), named.c.sha256 != but, _is_kept(named.c.sha256, known))
        )
        session.execute(insert_into(session, ImageOriginRow).from_select(_COLUMNS, found).on_conflict_do_nothing())


def note_labelled(session: Session, sha256: str, job_id: str) -> None:
    """Notes that a job was labelled with an image of which the same had been said before."""
    found = select(literal(sha256), _JOBS.c.id, _JOBS.c.tenant, _JOBS.c.created_at).where(_JOBS.c.id == job_id)
    insert = insert_into(session, ImageOriginRow).from_select(_COLUMNS, found)
    session.execute(insert.on_conflict_do_nothing())


def forget_origins(session: Session, hashes: Collection[str]) -> None:
    """Forgets whose these images were, as far as nothing of them is kept any more."""
    known = list(encoders(session))
    for some in chunks(sorted(hashes), IN_LIST):
        session.execute(delete(_ORIGINS).where(_ORIGINS.c.sha256.in_(some), ~_is_kept(_ORIGINS.c.sha256, known)))


def encoders(session: Session) -> Iterator[str]:
    """Every encoder of which embeddings are kept, each found by one step along the key."""
    least = func.min(_EMBEDDINGS.c.encoder_sha256)
    encoder = session.scalar(select(least))
    while encoder is not None:
        yield encoder
        encoder = session.scalar(select(least).where(_EMBEDDINGS.c.encoder_sha256 > encoder))


def _is_kept(sha256: ColumnElement[Any], known: Sequence[str]) -> ColumnElement[bool]:
    embedded = (
        exists().where(and_(_EMBEDDINGS.c.encoder_sha256 == encoder, _EMBEDDINGS.c.sha256 == sha256))
        for encoder in known
    )
    said = exists().where(_LABELS.c.sha256 == sha256)
    copied = exists().where(_KEPT.c.sha256 == sha256)
    return or_(said, copied, *embedded)
