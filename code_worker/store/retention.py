"""Deletes what is too old to be kept, in bounded batches, and overwrites it in the database's files."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, CursorResult, Table, delete, exists, func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from code_worker.errors import StoreUnavailableError
from code_worker.store import audit
from code_worker.store.database_errors import classify, translate
from code_worker.store.engine import Store
from code_worker.store.erasure import personal
from code_worker.store.ids import uuid7_floor
from code_worker.store.learning import image_groups, kept_images
from code_worker.store.models import (
    DeadLetterRow,
    EmbeddingRow,
    ImportedRow,
    JobRow,
    KeptImageRow,
    LabelRow,
    RunMetricsRow,
    ScheduleSlotRow,
    ShadowScoreRow,
    VerdictRow,
)
from code_worker.store.sql import among, database_time, table_of

_TABLES: Final = (
    "jobs, verdicts, labels, embeddings, shadow_scores, kept_images, imported_rows, dead_letters, snapshots, runs, "
    "erasures, erasure_targets, image_origins, copies_to_drop, image_groups, source_pauses"
)
_PATIENCE_S: Final = 60.0


def purge(store: Store) -> None:
    """Leaves nothing of deleted rows in the database's files, as far as the database can.

    SQLite: the file is rewritten without its free pages and the log cut to nothing; writers wait meanwhile, and it
    takes as much disk again as the database. PostgreSQL: the tables are vacuumed, so that their pages are used again,
    and analysed, so that the statistics of their columns hold no value that is gone. What a dead row left on a page
    goes when that is overwritten, or at once by `VACUUM FULL`, which is an operator's decision since it locks the
    tables.

    Raises:
        StoreUnavailableError: somebody kept reading an older state of the database; try again.
        StoreFullError: the disk is too full to rewrite the file.
    """
    try:
        if store.dialect == "postgresql":
            _vacuum(store)
        else:
            _rewrite(store)
    except SQLAlchemyError as error:
        raise translate(error, classify(error)) from error


def _vacuum(store: Store) -> None:
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if store.pooled:
            # The limit is set within our transactions alone, and what is set here another's connection would keep.
            connection.execute(text(f"VACUUM (ANALYZE) {_TABLES}"))
            return
        connection.execute(text("SET statement_timeout = 0"))
        try:
            connection.execute(text(f"VACUUM (ANALYZE) {_TABLES}"))
            # The connection goes back to the pool; its next user wants the limit again.
            connection.execute(text("RESET statement_timeout"))
        except BaseException:
            # Nobody knows whether the limit was set again: such a connection must not return to the pool.
            connection.invalidate()
            raise


def _rewrite(store: Store) -> None:
    """By a connection of its own: VACUUM must be in no transaction, and ours begin one by themselves."""
    assert store.engine.url.database is not None  # noqa: S101 - SQLite here always lives in a file
    with closing(sqlite3.connect(store.engine.url.database, timeout=_PATIENCE_S, isolation_level=None)) as connection:
        try:
            connection.execute("VACUUM")
            deadline = time.monotonic() + _PATIENCE_S
            # A reader holds on to the log; a busy answer is no error.
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > deadline:
                    raise StoreUnavailableError(
                        "the database's log cannot be emptied: something has been reading from it for a minute; try "
                        "again, or stop what reads"
                    )
                time.sleep(0.2)
        except sqlite3.OperationalError as error:
            raise StoreUnavailableError(f"the database cannot be rewritten: {error}") from error


ACTOR: Final = "retention"
_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)
_NEWER = _VERDICTS.alias("newer")
_SHADOW = table_of(ShadowScoreRow)
_EMBEDDINGS = table_of(EmbeddingRow)
_KEPT = table_of(KeptImageRow)
_LABELS = table_of(LabelRow)
_LATER = _LABELS.alias("later")
_ROWS = table_of(ImportedRow)
_LETTERS = table_of(DeadLetterRow)
_CURVES = table_of(RunMetricsRow)
_SLOTS = table_of(ScheduleSlotRow)
Prune = Callable[[Session, float, int], int]


def jobs(session: Session, days: float, limit: int) -> int:
    """Finished jobs whose last verdict is that old, with their verdicts and shadow scores.

    Whose images they were is noted for as long as something of an image is kept.
    """
    moment = _moment(session, days)
    old = (
        select(_JOBS.c.id)
        # When it was accepted follows from when it was finished; it
        # is asked for since ix_jobs_created_at_id begins with it.
        .where(_JOBS.c.created_at < moment, _JOBS.c.finished_at < moment, _JOBS.c.due_at.is_(None))
        .where(~exists().where(_VERDICTS.c.job_id == _JOBS.c.id, _VERDICTS.c.created_at >= moment))
        .order_by(_JOBS.c.created_at, _JOBS.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    found = list(session.scalars(old))
    if not found:
        return 0
    personal.note_origins(session, found)
    kept_images.look_again_at(session, found)
    # Last before the deletes: the audit's lock is held to the end of the transaction.
    entry = _entry(session, "jobs", days, len(found))
    with audit.removal(session, entry):
        session.execute(delete(_SHADOW).where(among(session, _SHADOW.c.job_id, found)))
        # Before the jobs, to which their foreign key leads.
        session.execute(delete(_VERDICTS).where(among(session, _VERDICTS.c.job_id, found)))
        session.execute(delete(_JOBS).where(among(session, _JOBS.c.id, found)))
    return len(found)


def superseded(session: Session, days: float, limit: int) -> int:
    """Verdicts that are that old and have a newer one of the same job; whose images they judged is noted."""
    newer = exists().where(_NEWER.c.job_id == _VERDICTS.c.job_id, _NEWER.c.revision > _VERDICTS.c.revision)
    before = _VERDICTS.c.id < uuid7_floor(_moment(session, days))
    rows = session.execute(
        select(_VERDICTS.c.id, _VERDICTS.c.job_id).where(before, newer).order_by(_VERDICTS.c.id).limit(limit)
    ).all()
    if not (found := [row.id for row in rows]):
        return 0
    # Held, so that no job of these is erased before its origins are there to be found. Of other bytes than the newest
    # verdict, perhaps: the object changed between two tries.
    there = sorted(personal.left(session, jobs={row.job_id for row in rows}).jobs)
    personal.note_origins(session, there)
    kept_images.look_again_at(session, there)
    with audit.removal(session, _entry(session, "superseded verdicts", days, len(found))):
        session.execute(delete(_VERDICTS).where(among(session, _VERDICTS.c.id, found)))
    return len(found)


def embeddings(session: Session, days: float, limit: int) -> int:
    """Embeddings of images of which no copy is kept: of a kept copy they could be made again anyway."""
    found = session.execute(
        select(_EMBEDDINGS.c.encoder_sha256, _EMBEDDINGS.c.sha256)
        .where(_EMBEDDINGS.c.created_at < _moment(session, days))
        .where(~exists().where(_KEPT.c.sha256 == _EMBEDDINGS.c.sha256))
        .order_by(_EMBEDDINGS.c.created_at)
        .limit(limit)
    ).all()
    # The primary key begins with the encoder: by it a delete by content hash is a look-up for each.
    by_encoder: dict[str, list[str]] = {}
    for encoder, sha256 in found:
        by_encoder.setdefault(encoder, []).append(sha256)
    count = sum(
        rowcount(
            session.execute(
                delete(_EMBEDDINGS).where(
                    _EMBEDDINGS.c.encoder_sha256 == encoder, _EMBEDDINGS.c.sha256.in_(sorted(hashes))
                )
            )
        )
        for encoder, hashes in by_encoder.items()
    )
    personal.forget_origins(session, {sha256 for _, sha256 in found})
    return count


def old_images(session: Session, days: float, limit: int) -> list[str]:
    """Content hashes of images of which nothing was said for that long, at most `limit`."""
    statement = select(_LABELS.c.sha256).where(*_unspoken_of(session, days)).order_by(_LABELS.c.id).limit(limit)
    return sorted(set(session.scalars(statement)))


def _unspoken_of(session: Session, days: float) -> tuple[ColumnElement[bool], ...]:
    floor = uuid7_floor(_moment(session, days))
    later = exists().where(_LATER.c.sha256 == _LABELS.c.sha256, _LATER.c.id >= floor)
    return _LABELS.c.id < floor, ~later


def forget_labels(session: Session, hashes: Sequence[str], days: float) -> int:
    """Deletes all that was said of these images, and the notes on their copies; returns how many statements.

    Images of which something was said meanwhile stay. The files of the others are `kept_images.copies_to_drop`: they
    go after the rows, so that nobody who labels such an image at this moment is left with a row and no copy.
    """
    # Locks are taken in this order by all who forget: the erasure's, that of groups, the audit's.
    personal.keep_out(session)
    among_these = _LABELS.c.sha256.in_(hashes)
    # Asked again, now that nobody can label: `old_images` read without a lock.
    still = sorted(set(session.scalars(select(_LABELS.c.sha256).where(among_these, *_unspoken_of(session, days)))))
    if not still:
        return 0
    image_groups.forget(session, still)
    with audit.removal(session, _entry(session, "labels", days, len(still))):
        count = rowcount(session.execute(delete(_LABELS).where(_LABELS.c.sha256.in_(still))))
        session.execute(delete(_ROWS).where(_ROWS.c.sha256.in_(still)))
        session.execute(delete(_KEPT).where(_KEPT.c.sha256.in_(still)))
    kept_images.to_drop(session, still)
    personal.forget_origins(session, still)
    return count


def shadow_scores(session: Session, days: float, limit: int) -> int:
    """Scores of challengers."""
    return _by_id(session, _SHADOW, days, limit)


def dead_letters(session: Session, days: float, limit: int) -> int:
    """Unreadable messages."""
    return _by_id(session, _LETTERS, days, limit)


def curves(session: Session, days: float, limit: int) -> int:
    """Points of curves; they are counted, so their order is that of time too."""
    return _oldest(session, _CURVES, _CURVES.c.id, _CURVES.c.created_at < _moment(session, days), limit)


def slots(session: Session, days: float, limit: int) -> int:
    """Times at which schedules fired, but for the last of each, by which a missed one is told."""
    last = select(func.max(_SLOTS.c.slot)).group_by(_SLOTS.c.name)
    old = (_SLOTS.c.slot < _moment(session, days)) & _SLOTS.c.slot.not_in(last)
    return _oldest(session, _SLOTS, _SLOTS.c.slot, old, limit)


PRUNERS: Final[Mapping[str, Prune]] = {
    "jobs": jobs,
    "superseded": superseded,
    "embeddings": embeddings,
    "shadow": shadow_scores,
    "dead_letters": dead_letters,
    "curves": curves,
    "slots": slots,
}
"""By the name of the setting `NAME_days`; labels have copies in the storage, so they are not among these."""


def rowcount(result: Any) -> int:
    """Returns how many rows a DELETE or UPDATE touched."""
    assert isinstance(result, CursorResult)  # noqa: S101 - such a statement always gives one
    return result.rowcount


def _moment(session: Session, days: float) -> datetime:
    return database_time(session) - timedelta(days=days)


def _by_id(session: Session, table: Table, days: float, limit: int) -> int:
    # Ids are UUIDv7 by the database's clock, so the primary key is the index of age.
    old = table.c.id < uuid7_floor(_moment(session, days))
    return _oldest(session, table, table.c.id, old, limit)


def _oldest(session: Session, table: Table, key: ColumnElement[Any], old: ColumnElement[bool], limit: int) -> int:
    found = select(key).where(old).order_by(key).limit(limit)
    # The condition is repeated since a key may not be unique: the slots of two schedules can have the same time.
    return rowcount(session.execute(delete(table).where(key.in_(found), old)))


def _entry(session: Session, what: str, days: float, count: int) -> audit.Entry:
    details = {"count": count, "older_than_days": days}
    return audit.record(session, actor=ACTOR, action="retention.remove", subject=what, details=details)
