"""Doubtful labels: the share that is wrong by their neighbours, suspicious labellers, and floods of one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.data.datasets.examples import FAKE, REAL
from code_worker.training.evaluation.metrics import figures
from code_worker.training.snapshot import LeftOut

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.training.snapshot import Member

MIN_SLICE: Final = 10
"""Images below which a share of wrong labels is not worth the name."""
_NEIGHBOURS: Final = 15
_TOLD_APART: Final = 0.7
"""Area under the ROC curve from which an encoder is said to see a generator."""
_BLOCK: Final = 1024


@dataclass(frozen=True, slots=True)
class Noise:
    """Wrong labels among images that look like one class.

    Attributes:
        among: which labels were in question, for people.
        looks: class they look like, 0 or 1.
        share: of them that is labelled as the other class; None where too few could be asked.
        images: how many were asked.
    """

    among: str
    looks: int
    share: float | None
    images: int


def label_noise(
    embeddings: NDArray[np.float32], labels: NDArray[np.int8], asked: NDArray[np.bool_], *, among: str
) -> tuple[Noise, Noise]:
    """Wrong labels among the images `asked`, by the cosine neighbours of each among all the others.

    Args:
        embeddings: `(n, 192) float32`.
        labels: `(n,) int8`.
        asked: `(n,) bool`, whose labels are in question.
        among: what to call these.

    Returns:
        For images that look real, and for those that look generated.
    """
    # A vote among neighbours assumes that an encoder puts like images together: see `unseen` for where it does not.
    rows = np.flatnonzero(asked)
    fakes = neighbour_shares(embeddings, labels, rows)
    return (
        _among_purest(among, REAL, fakes, labels[rows]),
        _among_purest(among, FAKE, -fakes, labels[rows]),
    )


def unseen(embeddings: NDArray[np.float32], labels: NDArray[np.int8], group: NDArray[np.bool_]) -> bool:
    """Returns whether neighbours cannot tell the fakes of a group from reals.

    Then they cannot check their labels either.

    Args:
        embeddings: `(n, 192) float32`.
        labels: `(n,) int8`.
        group: `(n,) bool`, fakes.
    """
    reals = labels == REAL
    if not (group.any() and reals.any()):
        return False
    rows = np.flatnonzero(group | reals)
    fakes = neighbour_shares(embeddings, labels, rows).astype(np.float32)
    # Area under the ROC curve of the neighbours' vote: 0.5 is chance, however large the classes are.
    return float(figures(labels[rows], fakes)["auroc"] or 0.0) < _TOLD_APART


def _among_purest(among: str, looks: int, unlikeness: NDArray[np.float64], labels: NDArray[np.int8]) -> Noise:
    # A third, rounded up: the purest slice, in which a label of the other class is most likely wrong (confident
    # learning takes a threshold in its place: Northcutt et al., 2021).
    count = -(-int((labels == looks).sum()) // 3)
    if count < MIN_SLICE:
        return Noise(among, looks, None, count)
    # Stable, so that ties do not depend on the processor.
    purest = np.argsort(unlikeness, kind="stable")[:count]
    return Noise(among, looks, float((labels[purest] != looks).mean()), count)


def neighbour_shares(
    embeddings: NDArray[np.float32], labels: NDArray[np.int8], rows: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Share of fakes among the nearest neighbours of each of the rows, itself left out."""
    count = min(_NEIGHBOURS, len(embeddings) - 1)
    if count < 1:
        return np.zeros(len(rows))
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(lengths > 0, lengths, 1)
    shares: list[NDArray[Any]] = []
    for start in range(0, len(rows), _BLOCK):
        some = rows[start : start + _BLOCK]
        # (block, n) cosines: the whole matrix of n² would not fit into memory.
        likeness = unit[some] @ unit.T
        # By position: scikit-learn's NearestNeighbors would give a copy of the image in its place, and took 1.6 times
        # as long.
        likeness[np.arange(len(some)), some] = -np.inf
        # (block, count): the nearest, in no order, which costs n instead of n log n.
        nearest = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
        # The mean over neighbours: (block,).
        shares.append((labels[nearest] == FAKE).mean(axis=1))
    return np.concatenate(shares) if shares else np.zeros(0)


"""Images that were left out, by who labelled them."""
_FEWEST: Final = 10
"""Labels below which nobody's share of errors is worth the name."""
_ORDINARY: Final = 0.1
"""Disagreement with neighbours that any encoder shows; history is never held to be cleaner than this."""
_CLOSE: Final = 0.2
"""Two images are nearly the same within this part of the distance at which images usually have their nearest."""
_SAMPLE: Final = 2000
_HISTORY: Final = 5000


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A measure of how much a labeller's new labels disagree with what lies around their images.

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
        """Returns how many times as much as history."""
        return self.share / self.history


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
        # (block, places), bool: cosine distance within the radius.
        close = 1 - unit[some] @ unit[places].T <= radius
        # Row r is image start + r, which may count columns before itself alone: so the first `most` of a flood always
        # stay.
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
    # An image is not its own neighbour: row r is column r · step.
    likeness[np.arange(len(sample)), np.arange(0, len(unit), step)] = -np.inf
    return float(np.median(1 - likeness.max(axis=1)))


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.asarray(embeddings / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def suspicions(
    members: Sequence[Member], embeddings: NDArray[np.float32], labels: NDArray[np.int8], eligible: NDArray[np.bool_]
) -> tuple[Suspicion, ...]:
    """Every labeller with ten or more new labels, the most suspicious first.

    Args:
        members: in any order.
        embeddings: `(n, 192) float32`, row i of `members[i]`.
        labels: `(n,) int8`.
        eligible: `(n,) bool`, images for which this encoder may speak: it did not learn their labels.
    """
    recent = np.array([member.new for member in members], dtype=np.bool_)
    old = np.flatnonzero(eligible & ~recent)
    # History is the mean of a sample: each image asked is compared with all.
    asked = np.sort(np.concatenate([np.flatnonzero(eligible & recent), old[:: max(1, len(old) // _HISTORY)]]))
    fakes = neighbour_shares(embeddings, labels, asked)
    otherwise = np.where(labels[asked] == 1, 1 - fakes, fakes)
    speakers = [members[place] for place in asked.tolist()]
    new = np.array([member.new for member in speakers], dtype=np.bool_)
    by = np.array([member.by for member in speakers], dtype=np.str_)
    before = float(otherwise[~new].mean()) if (~new).sum() >= _FEWEST else _ORDINARY
    # Old labels that happen to agree entirely would make any new disagreement infinitely suspicious.
    history = max(before, _ORDINARY)
    found = [
        Suspicion(name, float(otherwise[new & (by == name)].mean()), history, count)
        for name, count in Counter(by[new].tolist()).items()
        if count >= _FEWEST
    ]
    return tuple(sorted(found, key=lambda one: (-one.ratio, one.by)))
