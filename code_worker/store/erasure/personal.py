"""Whose image something is, and whether it is still there: asked before anything personal is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, delete, exists, func, literal, or_, select, union
from sqlalchemy.orm import Session

from code_worker.store.erasure.receipts import IMAGE, RUNNING, digest
from code_worker.store.ids import valid_uuids
from code_worker.store.models import (
    CopyToDropRow,
    EmbeddingRow,
    ErasedDigestRow,
    ErasureRow,
    ImageOriginRow,
    JobRow,
    KeptImageRow,
    LabelRow,
    VerdictRow,
)
from code_worker.store.sql import IN_LIST, among, database_time, insert_into, table_of, unindexed
from code_worker.wire import chunks

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
    # SELECT DISTINCT would read the key of every embedding to find a handful of encoders.
    least = func.min(_EMBEDDINGS.c.encoder_sha256)
    encoder = session.scalar(select(least))
    while encoder is not None:
        yield encoder
        encoder = session.scalar(select(least).where(_EMBEDDINGS.c.encoder_sha256 > encoder))


def _is_kept(sha256: ColumnElement[Any], known: Sequence[str]) -> ColumnElement[bool]:
    # Named one by one: the primary key begins with the encoder, and by the hash alone it would not be used.
    embedded = (
        exists().where(and_(_EMBEDDINGS.c.encoder_sha256 == encoder, _EMBEDDINGS.c.sha256 == sha256))
        for encoder in known
    )
    said = exists().where(_LABELS.c.sha256 == sha256)
    copied = exists().where(_KEPT.c.sha256 == sha256)
    return or_(said, copied, *embedded)


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
    """Returns which of these jobs and images are not erased; until the transaction ends, none of them will be.

    Args:
        session: a unit of work that writes; ask before the first write.
        jobs: ids; those without a row were erased, or are too old to be kept.
        images: content hashes.
        since: when the writer began to read these images (see `moment`): what was erased since is not left. What is
            being erased now never is.
    """
    if session.get_bind().dialect.name == "postgresql":
        # Shared: writers do not hold one another up, only an erasure (`keep_out`) and they do. On SQLite there is one
        # writer at a time, and BEGIN IMMEDIATE has made this transaction that one.
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
        # One moment for all of a chunk, the earliest: at worst a
        # verdict is dropped for nothing, and its job judged again.
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
    return database_time(session)


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
        # Computed here and looked up: the digests that are stored cannot be turned back into hashes.
        named = {digest(salt, IMAGE, sha256): sha256 for sha256 in hashes}
        for some in chunks(sorted(named), IN_LIST):
            mine = (_DIGESTS.c.erasure_id == erasure_id, _DIGESTS.c.digest.in_(some))
            found.update(named[one] for one in session.scalars(select(_DIGESTS.c.digest).where(*mine)))
    return found
