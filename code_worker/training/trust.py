"""What one labeller may do to the learning: a share of what is new, no floods of one image, no stream of errors.

Nothing here judges who is right; it bounds what a single hand can teach and names the hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.training.noise import neighbour_shares

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.training.snapshot import Member

__all__ = ["LeftOut", "Suspicion", "cap_shares", "drop_floods", "suspicions"]

LeftOut = Mapping[str, int]
"""Images that were left out, by who labelled them."""
_FEWEST: Final = 10
"""Labels below which nobody's share of errors is worth the name."""
_ORDINARY: Final = 0.1
"""Disagreement with neighbours that any encoder shows; history is never held to be cleaner than this."""
_CLOSE: Final = 0.2
"""Two images are nearly the same within this part of the distance at which images usually have their nearest."""
_SAMPLE: Final = 2000
_HISTORY: Final = 5000
_BLOCK: Final = 1024


@dataclass(frozen=True, slots=True)
class Suspicion:
    """How much a labeller's new labels disagree with what lies around their images.

    Attributes:
        by: who labelled them.
        share: of the nearest neighbours of their images, the mean share that is labelled otherwise.
        history: the same of labels from before; at least what any encoder shows.
        images: how many new labels.
    """

    by: str
    share: float
    history: float
    images: int

    @property
    def ratio(self) -> float:
        """How many times as much as history."""
        return self.share / self.history


def cap_shares(
    members: Sequence[Member], max_share: float | None, trusted: Collection[str] = ()
) -> tuple[list[Member], LeftOut]:
    """Leaves out of the new images what exceeds a labeller's share of all new ones that stay.

    Among fewer labellers than would fit the share, each may have an equal one; a single labeller is not capped, for
    there is nobody to be outvoted. Trusted ones count and are never cut. Which images stay is decided by content
    hash, so that the next run keeps the same ones.

    Args:
        members: sorted by content hash.
        max_share: of the new images, 0 to 1; None: no cap.
        trusted: labellers that are not cut.
    """
    counts = Counter(member.by for member in members if member.new)
    if max_share is None or len(counts) < 2:
        return list(members), {}
    # Among few, equal shares are as small as shares can be; trusted ones make room for smaller ones.
    least = 0 if any(by in trusted for by in counts) else 1 / len(counts)
    limit = _limit(counts, max(max_share, least), trusted)
    seen: Counter[str] = Counter()
    stay, left = [], Counter[str]()
    for member in members:
        if member.new and member.by not in trusted:
            seen[member.by] += 1
            if seen[member.by] > limit:
                left[member.by] += 1
                continue
        stay.append(member)
    return stay, dict(sorted(left.items()))


def _limit(counts: Mapping[str, int], share: float, trusted: Collection[str]) -> int:
    """The most that one labeller may have, so that it is at most the share of what all have then."""
    fixed = sum(count for by, count in counts.items() if by in trusted)
    others = [count for by, count in counts.items() if by not in trusted]

    def fits(limit: int) -> bool:
        total = fixed + sum(min(count, limit) for count in others)
        return min(max(others, default=0), limit) <= share * total + 1e-9

    low, high = 0, max(others, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def drop_floods(
    members: Sequence[Member], embeddings: NDArray[np.float32], most: int | None
) -> tuple[list[Member], LeftOut]:
    """Leaves out new images of which one labeller gave more than `most` that are nearly the same, all called alike.

    Nearly the same: much closer than images usually have their nearest neighbour, in this encoder's own measure.

    Args:
        members: sorted by content hash.
        embeddings: `(n, 192) float32`, row i of `members[i]`.
        most: how many of such stay; None: all.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for place, member in enumerate(members):
        if member.new:
            groups.setdefault((member.by, member.label), []).append(place)
    large = [places for places in groups.values() if most is not None and len(places) > most]
    if most is None or not large:
        return list(members), {}
    unit = _unit(embeddings)
    before = [place for place, member in enumerate(members) if not member.new]
    radius = _CLOSE * _usual_distance(unit[before] if len(before) >= _FEWEST else unit)
    flooded = {place for places in large for place in _flooded(unit, places, radius, most)}
    left = Counter(members[place].by for place in flooded)
    return [one for place, one in enumerate(members) if place not in flooded], dict(sorted(left.items()))


def _flooded(unit: NDArray[np.float32], places: Sequence[int], radius: float, most: int) -> list[int]:
    """Those that have `most` or more nearly equal ones before them."""
    found = []
    for start in range(0, len(places), _BLOCK):
        some = places[start : start + _BLOCK]
        close = 1 - unit[some] @ unit[places].T <= radius
        earlier = np.tril(close, start - 1).sum(axis=1)
        found += [place for place, count in zip(some, earlier.tolist(), strict=True) if count >= most]
    return found


def _usual_distance(unit: NDArray[np.float32]) -> float:
    """Median cosine distance to the nearest other image, of a sample."""
    step = max(1, len(unit) // _SAMPLE)
    sample = unit[::step]
    if len(sample) < 2:
        return 0.0
    likeness = sample @ unit.T
    likeness[np.arange(len(sample)), np.arange(0, len(unit), step)] = -np.inf
    return float(np.median(1 - likeness.max(axis=1)))


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.asarray(embeddings / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def suspicions(
    members: Sequence[Member], embeddings: NDArray[np.float32], labels: NDArray[np.int8], honest: NDArray[np.bool_]
) -> tuple[Suspicion, ...]:
    """Every labeller with ten or more new labels, the most suspicious first.

    Args:
        members: in any order.
        embeddings: `(n, 192) float32`, row i of `members[i]`.
        labels: `(n,) int8`.
        honest: `(n,) bool`, images for which this encoder may speak: it did not learn their labels.
    """
    recent = np.array([member.new for member in members], dtype=np.bool_)
    old = np.flatnonzero(honest & ~recent)
    # History is the mean of a sample: each image asked is compared with all.
    asked = np.sort(np.concatenate([np.flatnonzero(honest & recent), old[:: max(1, len(old) // _HISTORY)]]))
    fakes = neighbour_shares(embeddings, labels, asked)
    otherwise = np.where(labels[asked] == 1, 1 - fakes, fakes)
    speakers = [members[place] for place in asked.tolist()]
    new = np.array([member.new for member in speakers], dtype=np.bool_)
    by = np.array([member.by for member in speakers], dtype=np.str_)
    before = float(otherwise[~new].mean()) if (~new).sum() >= _FEWEST else _ORDINARY
    history = max(before, _ORDINARY)
    found = [
        Suspicion(name, float(otherwise[new & (by == name)].mean()), history, count)
        for name, count in Counter(by[new].tolist()).items()
        if count >= _FEWEST
    ]
    return tuple(sorted(found, key=lambda one: (-one.ratio, one.by)))
