"""Proof that a head that was saved and loaded is the head that was fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from code_worker.errors import ArtifactError
from code_worker.types import EMBEDDING_DIM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.heads import Head

__all__ = ["check_same_scores", "checked_scores", "golden_embeddings"]

GOLDEN_COUNT = 256


def golden_embeddings(count: int = GOLDEN_COUNT, seed: int = 20_240) -> NDArray[np.float32]:
    """`(count, 192) float32`, the same for the same seed everywhere.

    Of the size that a final LayerNorm gives, from tightly packed to far apart: both sides of a border are met.
    """
    rng = np.random.default_rng(seed)
    spread = np.geomspace(0.05, 4.0, count)[:, None]
    return (rng.standard_normal((count, EMBEDDING_DIM)) * spread).astype(np.float32)


def checked_scores(name: str, head: Head, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores of a head that keeps its contract.

    Raises:
        ArtifactError: the head failed, or its scores are of the wrong shape or outside [0, 1].
    """
    try:
        with np.errstate(all="ignore"):  # an application may have numpy raise on every underflow
            scores = np.asarray(head.score(embeddings))
    except Exception as error:  # a head is somebody else's code: whatever it raises, this release cannot be used
        raise ArtifactError(f"head {name!r} cannot score: {type(error).__name__}: {error}") from error
    if scores.shape != (len(embeddings),):
        raise ArtifactError(f"head {name!r} returned scores of shape {scores.shape}, not ({len(embeddings)},)")
    if not bool(np.all((scores >= 0) & (scores <= 1))):
        raise ArtifactError(f"head {name!r} returned scores outside [0, 1]")
    return scores


def check_same_scores(fitted: Mapping[str, Head], loaded: Mapping[str, Head]) -> None:
    """Compares the scores of heads before saving and after loading, bit by bit.

    Raises:
        ArtifactError: names the first head that scores differently, and by how much.
    """
    embeddings = golden_embeddings()
    for name, head in fitted.items():
        before, after = (checked_scores(name, one, embeddings) for one in (head, loaded[name]))
        if not np.array_equal(before, after):
            worst = float(np.abs(before.astype(np.float64) - after).max())
            raise ArtifactError(
                f"head {name!r} scores differently once saved and loaded: by up to {worst:.3g} on "
                f"{GOLDEN_COUNT} embeddings; its save() or load() loses something"
            )
