"""How many labels of a class are wrong, told from images whose neighbours leave no doubt what they are.

Counting the images that their nearest neighbours contradict would count whatever an encoder cannot tell apart as
wrong labels. So only the third of a class that looks most like it is asked: there even a middling encoder mixes few
images in, while wrong labels are as frequent as anywhere. These are the anchor points of Liu and Tao (2016),
"Classification with noisy labels by importance reweighting", found by nearest neighbours other than the image itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.data.examples import FAKE, REAL
from code_worker.training.metrics import figures

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MIN_SLICE", "Noise", "label_noise", "neighbour_shares", "unseen"]

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
    rows = np.flatnonzero(asked)
    fakes = neighbour_shares(embeddings, labels, rows)
    return (
        _among_purest(among, REAL, fakes, labels[rows]),
        _among_purest(among, FAKE, -fakes, labels[rows]),
    )


def unseen(embeddings: NDArray[np.float32], labels: NDArray[np.int8], group: NDArray[np.bool_]) -> bool:
    """Whether neighbours cannot tell the fakes of a group from reals: then they cannot check their labels either.

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
    return float(figures(labels[rows], fakes)["auroc"] or 0.0) < _TOLD_APART


def _among_purest(among: str, looks: int, unlikeness: NDArray[np.float64], labels: NDArray[np.int8]) -> Noise:
    count = -(-int((labels == looks).sum()) // 3)
    if count < MIN_SLICE:
        return Noise(among, looks, None, count)
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
        likeness = unit[some] @ unit.T
        likeness[np.arange(len(some)), some] = -np.inf
        nearest = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
        shares.append((labels[nearest] == FAKE).mean(axis=1))
    return np.concatenate(shares) if shares else np.zeros(0)
