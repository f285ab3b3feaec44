"""Calls a head, which is somebody else's code, so that it can spoil no more than its own images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from code_worker.logs import get_logger
from code_worker.stops import raise_if_stop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.heads import Head
    from code_worker.moderation.collect import Item

__all__ = ["score_items", "score_rows"]

log = get_logger(__name__)
Failed = Callable[[BaseException, int], None]
"""Called with what a head raised, and over how many images."""


def score_items(head: Head, name: str, items: Sequence[Item]) -> list[float | str]:
    """A score in [0, 1] per item, or the text of what went wrong with it."""
    matrix = np.stack([item.embedding for item in items if item.embedding is not None])

    def failed(error: BaseException, images: int) -> None:
        log.error("head_failed", head=name, images=images, exc_info=error)

    return score_rows(head, name, matrix, failed)


def score_rows(head: Head, name: str, matrix: NDArray[np.float32], failed: Failed) -> list[float | str]:
    """A score in [0, 1] per row of `(n, 192) float32`, or the text of what went wrong with it."""
    whole = _try_score(head, name, matrix, failed)
    if not isinstance(whole, str):
        return [_checked(float(score), name) for score in whole]
    if len(matrix) == 1:
        return [whole]
    # One row at a time: only the images that the head cannot take are without a score.
    rows = [_try_score(head, name, row[None], failed) for row in matrix]
    return [row if isinstance(row, str) else _checked(float(row[0]), name) for row in rows]


def _try_score(head: Head, name: str, matrix: NDArray[np.float32], failed: Failed) -> NDArray[np.float32] | str:
    try:
        # An application may have numpy raise on every underflow; what is not finite is looked for all the same.
        with np.errstate(all="ignore"):
            scores = np.asarray(head.score(matrix))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a head is somebody else's code and may raise anything
        raise_if_stop(error)
        failed(error, len(matrix))
        return f"head {name!r} failed: {type(error).__name__}: {error}"[:500]
    if scores.shape != (len(matrix),):
        return f"head {name!r} returned shape {scores.shape}, not ({len(matrix)},)"
    return scores


def _checked(score: float, name: str) -> float | str:
    if 0.0 <= score <= 1.0:
        return score
    return f"head {name!r} returned {score}, which is not in [0, 1]"
