"""Images of which the dataset storage keeps a copy, what their headers say, and which of them look alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, delete, exists, or_, select, update
from sqlalchemy.orm import Session

from code_worker.store.erasure import personal
from code_worker.store.models import CopyToDropRow, KeptImageRow, LabelRow, VerdictRow, db_now, db_now_plus
from code_worker.store.sql import IN_LIST, among, insert_new, table_of
from code_worker.wire import chunks

NEAR_BITS: Final = 6
"""Images whose perceptual hashes differ in at most so many of 64 bits are near-duplicates of each other.

So near are copies of whole photographs, logos and sparse pages that were re-encoded down to JPEG 30 or resized down
to a half; pieces of different photographs differ in 31 bits on average, and none of 12,000 pairs is as near
(`tests/test_phash.py`).
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
_DROPS = table_of(CopyToDropRow)
_LABELS = table_of(LabelRow)
_VERDICTS = table_of(VerdictRow)
_LONGEST_S: Final = 30 * 86_400.0
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


def note_kept(session: Session, images: Sequence[KeptImage], *, since: datetime | None = None) -> set[str]:
    """Notes that copies are kept, before they are written, so that no copy is without a row that leads to it.

    What is noted stays as it is, but counts as kept now. Returns the hashes of those noted: not of what was erased
    `since` (see `personal.left`), nor of a copy that is about to be deleted.
    """
    there = personal.left(session, images=(image.sha256 for image in images), since=since).images
    rows = {
        # Reversed, so that of several with the same content the first one's address stays.
        image.sha256: {**asdict(image), **_bands(image.phash)}
        for image in reversed(images)
        if image.sha256 in there
    }
    insert_new(session, KeptImageRow, [rows[sha256] for sha256 in sorted(rows)], same=["sha256"])
    # Kept anew, also where the row was there: for an hour `forget_unsaid` leaves it to the one who labels it now.
    for some in chunks(sorted(rows), IN_LIST):
        session.execute(update(_KEPT).where(_KEPT.c.sha256.in_(some)).values(created_at=db_now()))
    return set(rows)


def drop_unnoted(session: Session, sha256: str) -> bool:
    """Has the file of a copy deleted if no row leads to it, which an erasure took meanwhile; returns whether."""
    personal.keep_out(session)
    if kept(session, [sha256]):
        return False
    to_drop(session, [sha256])
    return True


def to_drop(session: Session, hashes: Iterable[str]) -> None:
    """The rows of these copies go in this transaction; until their files are `dropped`, none is kept anew."""
    rows = [{"sha256": sha256} for sha256 in sorted(set(hashes))]
    insert_new(session, CopyToDropRow, rows, same=["sha256"])


def copies_to_drop(session: Session, *, limit: int) -> list[str]:
    """Content hashes of copies whose files must go."""
    return list(session.scalars(select(_DROPS.c.sha256).order_by(_DROPS.c.sha256).limit(limit)))


def dropped(session: Session, hashes: Iterable[str]) -> bool:
    """Their files went; returns whether this was not known yet."""
    known = False
    for some in chunks(sorted(set(hashes)), IN_LIST):
        gone = delete(_DROPS).where(_DROPS.c.sha256.in_(some)).returning(_DROPS.c.sha256)
        known |= bool(session.scalars(gone).all())
    return known


def forget_unsaid(session: Session, *, older_s: float, limit: int) -> int:
    """Forgets copies of images that no job judged and of which nothing was said: their labeller died meanwhile.

    Nobody is held up unless there are any.

    Args:
        session: a unit of work that writes.
        older_s: noted longer ago than this, and within the last month.
        limit: at most so many.

    Returns:
        How many; `copies_to_drop` has them.
    """
    unsaid = (
        # Both ends, for ix_kept_images_created_at: what is older was looked at every few minutes for a month.
        _KEPT.c.created_at > db_now_plus(-_LONGEST_S),
        _KEPT.c.created_at < db_now_plus(-older_s),
        ~exists().where(_LABELS.c.sha256 == _KEPT.c.sha256),
        ~exists().where(_VERDICTS.c.sha256 == _KEPT.c.sha256),
    )
    # First without the lock, which every labeller waits for: nearly always there is nothing.
    found = list(session.scalars(select(_KEPT.c.sha256).where(*unsaid).limit(limit)))
    if not found:
        return 0
    personal.keep_out(session)
    gone: list[str] = []
    for some in chunks(found, IN_LIST):
        # Asked again: somebody may have labelled it meanwhile.
        forgotten = delete(_KEPT).where(_KEPT.c.sha256.in_(some), *unsaid)
        gone += session.scalars(forgotten.returning(_KEPT.c.sha256))
    to_drop(session, gone)
    personal.forget_origins(session, gone)
    return len(gone)


def look_again_at(session: Session, job_ids: Sequence[str]) -> None:
    """Copies of what these jobs judged, whose verdicts go, and of which nothing is said count as kept now.

    So `forget_unsaid` finds them, however old they are.
    """
    for some in chunks(job_ids, IN_LIST):
        judged = select(_VERDICTS.c.sha256).where(among(session, _VERDICTS.c.job_id, some))
        said = exists().where(_LABELS.c.sha256 == _KEPT.c.sha256)
        session.execute(update(_KEPT).where(_KEPT.c.sha256.in_(judged), ~said).values(created_at=db_now()))


def near(phash: str) -> ColumnElement[bool]:
    """Returns whether a copy's hash shares a band of 16 bits with this one, but for one bit at most.

    Of hashes that differ in seven bits or fewer this is true of all, since one of four bands then differs in at most
    one (multi-index hashing: Norouzi, Punjani and Fleet, CVPR 2012); each band is found by an index. It is also true
    of some that differ in more: `is_near` tells.
    """
    return or_(*(_KEPT.c[name].in_(list(_within_one(value))) for name, value in _bands(phash).items()))


def is_near(first: str, second: str) -> bool:
    """Returns whether two perceptual hashes are those of near-duplicates."""
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
