"""Whether a candidate still says what the champion says of images that are known and that it judges rightly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.training.metrics import wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.training.metrics import Threshold

__all__ = ["MIN_CANARIES", "Drift", "drift", "stability_index"]

MIN_CANARIES: Final = 200
"""Images below which a few per cent are a matter of single images."""
_BINS: Final = 10
_LEAST: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Drift:
    """Candidate beside champion on known images.

    Attributes:
        images: how many.
        canaries: how many of them the champion judges as they are labelled.
        agreement: share of the canaries of which both say the same.
        agreement_high: upper end of its 95 % Wilson interval: what it might be if chance was unkind.
        psi: population stability index of the scores of all of them.
    """

    images: int
    canaries: int
    agreement: float
    agreement_high: float
    psi: float


def stability_index(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Population stability index: Σ (p - q) ln(p / q) over ten equal parts of [0, 1].

    Equal parts instead of the usual deciles: scores crowd at 0 and 1, where deciles would tell 0.001 from 0.002.
    """
    shares = [np.histogram(scores, bins=_BINS, range=(0, 1))[0] / max(1, len(scores)) for scores in (before, after)]
    p, q = (np.maximum(share, _LEAST) for share in shares)
    return float(((q - p) * np.log(q / p)).sum())


def drift(
    labels: NDArray[np.int8],
    champion: NDArray[np.float32],
    candidate: NDArray[np.float32],
    *,
    champion_at: Threshold,
    candidate_at: Threshold,
) -> Drift | None:
    """How far apart the two are; None without canaries.

    Where the champion is wrong, or in doubt, a candidate may well differ: only what it gets right can be broken.

    Args:
        labels: `(n,) int8`.
        champion: `(n,)` scores of the release in use.
        candidate: `(n,)` scores of the other, of the same images.
        champion_at: where the first decides.
        candidate_at: where the second decides.
    """
    before, after = _said(champion, champion_at), _said(candidate, candidate_at)
    canaries = before == 2 * labels
    count = int(canaries.sum())
    if not count:
        return None
    same = int((before == after)[canaries].sum())
    psi = stability_index(champion, candidate)
    return Drift(len(labels), count, same / count, wilson(same, count)[1], psi)


def _said(scores: NDArray[np.float32], threshold: Threshold) -> NDArray[np.int8]:
    """0 real, 1 uncertain, 2 fake."""
    low, high = threshold if isinstance(threshold, tuple) else (threshold, threshold)
    return (scores >= high).astype(np.int8) + (scores >= low).astype(np.int8)
