"""Which labelled images may be learned from: the rule of the split, and the last check before anything is learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from code_worker.errors import TrainingError
from code_worker.store.splits import (
    HOLDOUT_SHARE,
    SPLITS,
    VALIDATION_SHARE,
    Split,
    is_holdout,
    recorded_split,
    split_in_share,
    split_of,
)

__all__ = [
    "HOLDOUT_SHARE",
    "SPLITS",
    "VALIDATION_SHARE",
    "Split",
    "is_holdout",
    "recorded_split",
    "refuse_holdout",
    "split_in_share",
    "split_of",
]


class Placed(Protocol):
    """An image and the part that was recorded for it."""

    @property
    def sha256(self) -> str:
        """Of the image's bytes, 64 hexadecimal digits."""

    @property
    def split(self) -> Split | None:
        """As the snapshot recorded it; None: by the rule of releases before groups."""


def refuse_holdout(items: Iterable[Placed]) -> None:
    """The last check before anything is learned.

    Raises:
        TrainingError: one of the images belongs to the hold-out.
    """
    for item in items:
        if recorded_split(item.sha256, item.split) == "holdout":
            raise TrainingError(f"image {item.sha256} belongs to the hold-out and must never be learned from")
