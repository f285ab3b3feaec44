"""The stored form of embeddings: 192 little-endian float32, by the hash of what was encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.types import EMBEDDING_DIM

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STORED: Final = np.dtype("<f4")
_BYTES: Final = EMBEDDING_DIM * _STORED.itemsize


def pack(embedding: NDArray[np.float32]) -> bytes:
    """Returns the 768 bytes of a `(192,) float32` embedding."""
    return embedding.astype(_STORED).tobytes()


def unpack(stored: Mapping[str, bytes]) -> dict[str, NDArray[np.float32]]:
    """Returns `(192,) float32` embeddings by content hash, without those of another length.

    Such a row cannot be written today, and an image without an embedding is only encoded once more.
    """
    # A copy of each: the array of a buffer would keep the whole row, and could not be written to.
    return {
        sha256: np.frombuffer(row, _STORED).astype(np.float32) for sha256, row in stored.items() if len(row) == _BYTES
    }
