"""Which images the dataset storage keeps a copy of, and what their headers say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from code_worker.queues import chunks
from code_worker.store.models import KeptImageRow
from code_worker.store.sql import IN_LIST, insert_new, table_of

__all__ = ["KeptImage", "kept", "note_kept"]


@dataclass(frozen=True, slots=True)
class KeptImage:
    """A kept copy: content hash, header facts, and where it was read first."""

    sha256: str
    size_bytes: int
    format: str | None
    width: int | None
    height: int | None
    uri: str


_KEPT = table_of(KeptImageRow)
_COLUMNS: Final = tuple(_KEPT.c[name] for name in KeptImage.__dataclass_fields__)


def kept(session: Session, hashes: Iterable[str]) -> dict[str, KeptImage]:
    """Those of these content hashes of which a copy was kept."""
    found: dict[str, KeptImage] = {}
    for some in chunks(dict.fromkeys(hashes), IN_LIST):
        rows = session.execute(select(*_COLUMNS).where(_KEPT.c.sha256.in_(some)))
        found.update((row.sha256, KeptImage(*row)) for row in rows)
    return found


def note_kept(session: Session, images: Sequence[KeptImage]) -> None:
    """Notes copies that are in the storage; what is noted stays as it is."""
    rows = {image.sha256: asdict(image) for image in reversed(images)}
    insert_new(session, KeptImageRow, [rows[sha256] for sha256 in sorted(rows)], same=["sha256"])
