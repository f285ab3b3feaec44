"""The worst mistakes: reals with the highest scores and generated images with the lowest, as small pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from code_worker.data.examples import FAKE, REAL
from code_worker.errors import DatasetError, ImageRejectedError, TransientError
from code_worker.images.decode import decode_crop

if TYPE_CHECKING:
    from code_worker.data.examples import Example
    from code_worker.settings import LimitSettings
    from code_worker.training.evaluation.evaluate import Scored

__all__ = ["Mistake", "worst_mistakes"]

_MOST: Final = 12
_SIDE: Final = 112
_QUALITY: Final = 70


@dataclass(frozen=True, slots=True)
class Mistake:
    """An image on the wrong side of a threshold.

    Attributes:
        key: what a person finds it by.
        score: what the head gave it.
        origin: its generator or collection.
        sha256: of its bytes.
        picture: a data URI of the pixels that were judged; None without thumbnails, or where it cannot be read again.
    """

    key: str
    score: float
    origin: str
    sha256: str
    picture: str | None


def worst_mistakes(
    scored: Scored, thresholds: tuple[float, float], limits: LimitSettings, *, thumbnails: bool
) -> tuple[list[Mistake], list[Mistake]]:
    """False alarms (reals from `high` on) and misses (generated ones below `low`), worst first, at most 12 each."""
    low, high = thresholds
    labels, scores = scored.labels, scored.scores
    alarms = np.flatnonzero((labels == REAL) & (scores >= high))
    misses = np.flatnonzero((labels == FAKE) & (scores < low))
    alarms = alarms[np.argsort(-scores[alarms], kind="stable")][:_MOST]
    misses = misses[np.argsort(scores[misses], kind="stable")][:_MOST]
    picture = (lambda example: _thumbnail(example, limits)) if thumbnails else (lambda _: None)
    return _mistakes(scored, alarms.tolist(), picture), _mistakes(scored, misses.tolist(), picture)


def _mistakes(scored: Scored, rows: list[int], picture: Callable[[Example], str | None]) -> list[Mistake]:
    found = []
    for row in rows:
        one = scored.examples[row]
        origin = (one.collection if one.label == REAL else one.generator) or ""
        found.append(Mistake(one.key, float(scored.scores[row]), origin, one.sha256 or "", picture(one)))
    return found


def _thumbnail(example: Example, limits: LimitSettings) -> str | None:
    try:
        crop = decode_crop(example.read(), limits)
    except (DatasetError, ImageRejectedError, TransientError):
        # It was readable a moment ago; the page says what it can without the picture.
        return None
    buffer = io.BytesIO()
    small = Image.fromarray(crop).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
