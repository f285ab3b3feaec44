"""Which images are never learned from: a fifth of all there are or will be, chosen by content, for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final, Protocol

from code_worker.errors import TrainingError

__all__ = ["HOLDOUT_SHARE", "is_holdout", "refuse_holdout"]

HOLDOUT_SHARE: Final = 0.2
# Changing either would let a later release learn from what an earlier one was measured on.
_SALT: Final = b"code_worker hold-out 1\0"
_BORDER: Final = 2**64 // 5


class Hashed(Protocol):
    """Anything with a content hash."""

    @property
    def sha256(self) -> str | None:
        """Of the image's bytes, 64 hexadecimal digits."""


def is_holdout(sha256: str) -> bool:
    """Whether the image of this content hash is only ever measured on: true of one in five.

    Hashed once more with a salt, so that whoever chooses images by their hash for another purpose chooses alike
    among both parts.
    """
    digest = hashlib.sha256(_SALT + bytes.fromhex(sha256)).digest()
    return int.from_bytes(digest[:8], "big") < _BORDER


def refuse_holdout(items: Iterable[Hashed]) -> None:
    """The last check before anything is learned.

    Raises:
        TrainingError: one of the images belongs to the hold-out, or has no hash to tell by.
    """
    for item in items:
        if item.sha256 is None:
            raise TrainingError("an image without a content hash cannot be learned from: it might be in the hold-out")
        if is_holdout(item.sha256):
            raise TrainingError(f"image {item.sha256} belongs to the hold-out and must never be learned from")
