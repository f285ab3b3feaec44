"""Which images the dataset storage keeps a copy of, what their headers say, and which of them look alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.orm import Session

from code_worker.queues import chunks
from code_worker.store.models import KeptImageRow
from code_worker.store.sql import IN_LIST, insert_new, table_of

__all__ = ["NEAR_BITS", "KeptImage", "bits", "is_near", "kept", "near", "note_hash", "note_kept"]

NEAR_BITS: Final = 6
"""Images whose perceptual hashes differ in at most so many of 64 bits are near-duplicates of each other.

So near are copies of whole photographs that were re-encoded down to JPEG 30 or resized down to a half; pieces of
different photographs differ in 32 bits on average, and none of 12,000 pairs is as near (`tests/test_phash.py`).
"""

_BANDS: Final = 4
_BAND_BITS: Final = 16


@dataclass(frozen=True, slots=True)
class KeptImage:
    """A kept copy: content hash, header facts, where it was read first, and its perceptual hash in hexadecimal."""

    sha256: str
    size_bytes: int
    format: str | None
    width: int | None
    height: int | None
    uri: str
    phash: str | None = None


_KEPT = table_of(KeptImageRow)
_COLUMNS: Final = tuple(_KEPT.c[name] for name in KeptImage.__dataclass_fields__)


def bits(phash: int | None) -> str | None:
    """A perceptual hash as it is stored: 16 hexadecimal digits."""
    return None if phash is None else f"{phash:016x}"


def kept(session: Session, hashes: Iterable[str]) -> dict[str, KeptImage]:
    """Those of these content hashes of which a copy was kept."""
    found: dict[str, KeptImage] = {}
    for some in chunks(dict.fromkeys(hashes), IN_LIST):
        rows = session.execute(select(*_COLUMNS).where(_KEPT.c.sha256.in_(some)))
        found.update((row.sha256, KeptImage(*row)) for row in rows)
    return found


def note_kept(session: Session, images: Sequence[KeptImage]) -> None:
    """Notes copies that are in the storage; what is noted stays as it is."""
    rows = {image.sha256: {**asdict(image), **_bands(image.phash)} for image in reversed(images)}
    insert_new(session, KeptImageRow, [rows[sha256] for sha256 in sorted(rows)], same=["sha256"])


def note_hash(session: Session, sha256: str, phash: str | None) -> None:
    """Notes the perceptual hash of a copy that was noted without one."""
    missing = update(_KEPT).where(_KEPT.c.sha256 == sha256, _KEPT.c.phash.is_(None))
    session.execute(missing.values(phash=phash, **_bands(phash)))


def near(phash: str) -> ColumnElement[bool]:
    """Whether a copy's hash shares a band of 16 bits with this one, but for one bit at most.

    Of hashes that differ in seven bits or fewer this is true of all, since one of four bands then differs in at most
    one (multi-index hashing: Norouzi, Punjani and Fleet, CVPR 2012); each band is found by an index. It is also true
    of some that differ in more: `is_near` tells.
    """
    return or_(*(_KEPT.c[name].in_(list(_within_one(value))) for name, value in _bands(phash).items()))


def is_near(first: str, second: str) -> bool:
    """Whether two perceptual hashes are those of near-duplicates."""
    return (int(first, 16) ^ int(second, 16)).bit_count() <= NEAR_BITS


def _bands(phash: str | None) -> dict[str, Any]:
    digits = _BAND_BITS // 4
    return {
        f"band_{band}": None if phash is None else int(phash[band * digits : (band + 1) * digits], 16)
        for band in range(_BANDS)
    }


def _within_one(value: int) -> Iterator[int]:
    """The value, and those that differ from it in one bit."""
    yield value
    yield from (value ^ (1 << bit) for bit in range(_BAND_BITS))
