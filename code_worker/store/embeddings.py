"""Embeddings by content, so that bytes seen before under the same encoder are not encoded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from code_worker.queues import chunks
from code_worker.store.models import EmbeddingRow
from code_worker.store.sql import IN_LIST, insert_new, table_of

__all__ = ["keep", "known"]

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


def keep(session: Session, encoder_sha256: str, vectors: Mapping[str, bytes]) -> None:
    """Keeps vectors by the sha256 of what they were computed from; what is there stays."""
    rows = [
        {"encoder_sha256": encoder_sha256, "sha256": sha256, "vector": vectors[sha256]} for sha256 in sorted(vectors)
    ]
    insert_new(session, EmbeddingRow, rows, same=["encoder_sha256", "sha256"])
