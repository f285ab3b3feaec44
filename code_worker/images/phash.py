"""A perceptual hash: 64 bits of an image's coarse structure, which re-encoding and resizing hardly change.

The hash is pHash's, by the discrete cosine transform (C. Zauner, "Implementation and Benchmarking of Perceptual Image
Hash Functions", 2010), with the signs taken against the median of all 64 lowest frequencies but the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from code_worker.errors import ImageRejectedError
from code_worker.images.decode import decode_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.settings import LimitSettings

__all__ = ["FEATURELESS", "perceptual_hash"]

FEATURELESS: Final = 0
"""Of every image without structure, such as one of a single colour: to the hash they are all alike."""

_SIDE: Final = 32
_KEPT: Final = 8
_DECODED_SIDE: Final = 8 * _SIDE
_LEAST_CONTRAST: Final = 1.0
"""Standard deviation in grey levels (of 255) under which rounding would decide the bits."""


def perceptual_hash(data: bytes, limits: LimitSettings) -> int | None:
    """The hash of the image that a file holds, 0 to 2**64 - 1; None if it cannot be decoded.

    Equal pixels give equal hashes, whatever the file has beside them. Copies that were re-encoded or resized as a
    whole differ in few bits (see `store.image_groups`); mirrored, turned and cropped ones look like other images.

    Raises:
        TransientError: this machine has no memory left for an image that is within the limits.
    """
    try:
        image = decode_whole(data, limits, least_side=_DECODED_SIDE)
    except ImageRejectedError:
        return None
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return _hash(np.asarray(grey, dtype=np.float64))


def _hash(grey: NDArray[np.float64]) -> int:
    """Of `(32, 32)` grey levels."""
    if grey.std() < _LEAST_CONTRAST:
        return FEATURELESS
    transform = _cosines()
    lowest = (transform @ grey @ transform.T).ravel()  # (64,), the first is the mean
    # The mean is above any median: its bit is 1 in every image with structure, and no such hash is FEATURELESS.
    bits = np.append(True, lowest[1:] > np.median(lowest[1:]))
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosines() -> NDArray[np.float64]:
    """`(8, 32)`: the rows of the DCT-II of 32 points that belong to its 8 lowest frequencies."""
    frequencies, points = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * frequencies * (2 * points + 1) / (2 * _SIDE))
