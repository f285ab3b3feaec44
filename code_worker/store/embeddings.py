"""Embeddings by content, so that bytes seen before under the same encoder are not encoded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from code_worker.store.erasure import personal
from code_worker.store.models import EmbeddingRow
from code_worker.store.sql import IN_LIST, insert_new, table_of
from code_worker.wire import chunks

_EMBEDDINGS = table_of(EmbeddingRow)


def known(session: Session, encoder_sha256: str, hashes: Iterable[str]) -> dict[str, bytes]:
    """Vectors (768 bytes: 192 float32, little-endian) of those contents that this encoder has seen, by sha256."""
    found: dict[str, bytes] = {}
    for some in chunks(dict.fromkeys(hashes), IN_LIST):
        rows = session.execute(
            select(_EMBEDDINGS.c.sha256, _EMBEDDINGS.c.vector).where(
                _EMBEDDINGS.c.encoder_sha256 == encoder_sha256, _EMBEDDINGS.c.sha256.in_(some)
            )
        )
        found.update((row.sha256, bytes(row.vector)) for row in rows)
    return found


def keep(
    session: Session,
    encoder_sha256: str,
    vectors: Mapping[str, bytes],
    *,
    jobs: Mapping[str, Iterable[str]] | None = None,
    since: datetime | None = None,
) -> None:
    """Keeps vectors of what is not erased by the sha256 of what they were computed from; what is there stays.

    Args:
        session: a unit of work that writes.
        encoder_sha256: of the encoder's weights.
        vectors: 768 bytes each.
        jobs: by content hash the jobs whose verdicts name the image; without one of them it is not kept. None: the
            images are of no job.
        since: when the first of the images was read, see `personal.left`; not needed with jobs.
    """
    if not vectors:
        return
    if jobs is None:
        kept = personal.left(session, images=vectors, since=since).images
    else:
        there = personal.left(session, jobs=(job for some in jobs.values() for job in some)).jobs
        kept = frozenset(sha256 for sha256 in vectors if not there.isdisjoint(jobs.get(sha256, ())))
    # Sorted by the key: two workers that judged the same images wait for each other instead of deadlocking.
    rows = [
        {"encoder_sha256": encoder_sha256, "sha256": sha256, "vector": vectors[sha256]} for sha256 in sorted(kept)
    ]
    insert_new(session, EmbeddingRow, rows, same=["encoder_sha256", "sha256"])
