"""A perceptual hash: 64 bits of an image's coarse structure, which re-encoding and resizing hardly change.

The hash is pHash's, by the discrete cosine transform (C. Zauner, "Implementation and Benchmarking of Perceptual Image
Hash Functions", 2010), with the signs taken against the median of all 64 lowest frequencies but the mean.
Coefficients as good as zero count as zero: symmetric pictures have many, and rounding would decide their bits. One
that is symmetric about both axes has no odd frequencies at all: of it the 64 lowest even ones count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from code_worker.errors import ImageRejectedError
from code_worker.images.decode import decode_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from code_worker.settings import LimitSettings

FEATURELESS: Final = 0
"""Of every image without structure, such as one of a single colour: to the hash they are all alike."""

_SIDE: Final = 32
_KEPT: Final = 8
_DECODED_SIDE: Final = 8 * _SIDE
_LEAST_CONTRAST: Final = 0.25
"""Standard deviation in grey levels (of 255) under which an image counts as one without structure.

A page with a line of text has more, a surface of one colour as a camera sees it has less.
"""
_AS_GOOD_AS_ZERO: Final = 0.005
"""Share of the largest coefficient: what copies differ in is smaller, and photographs have few that small."""
_AS_GOOD_AS_SYMMETRIC: Final = 0.01
"""Share of odd frequencies: re-encoded copies of what is symmetric about both axes have less."""


def perceptual_hash(data: bytes, limits: LimitSettings) -> int | None:
    """The hash of the image that a file holds, 0 to 2**64 - 1; None if it cannot be decoded.

    Equal pixels give equal hashes, and bytes beside them change nothing. What is transparent counts with the colour
    that lies there, as it is judged. Only where the colours alone have no structure (a logo of one colour) it is the
    hash of the image on black, else on white. Copies that were re-encoded or resized as a whole differ in few bits
    (see `store.kept_images.NEAR_BITS`); mirrored, turned and cropped ones look like other images.

    Raises:
        TransientError: this machine has no memory left for an image that is within the limits.
    """
    try:
        image = decode_whole(data, limits, least_side=_DECODED_SIDE, alpha=True)
    except ImageRejectedError:
        return None
    return next((_hash(grey) for grey in _greys(image) if grey.std() >= _LEAST_CONTRAST), FEATURELESS)


def _greys(image: Image.Image) -> Iterator[NDArray[np.float64]]:
    """`(32, 32)` grey levels: of the colours alone, then of what is seen on black and on white."""
    yield _shrunk(image.convert("L"))
    if image.mode == "RGBA":
        small = image.resize(_at_most(image, _DECODED_SIDE), Image.Resampling.LANCZOS)
        # Black first: it is what most programs leave behind what is transparent when they write a copy.
        for colour in ("black", "white"):
            seen = Image.new("RGB", small.size, colour)
            seen.paste(small, mask=small)
            yield _shrunk(seen.convert("L"))


def _shrunk(grey: Image.Image) -> NDArray[np.float64]:
    """In floating point at the end, so that faint structure is not rounded away."""
    less = grey.resize(_at_most(grey, _DECODED_SIDE), Image.Resampling.LANCZOS).convert("F")
    return np.asarray(less.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)


def _at_most(image: Image.Image, side: int) -> tuple[int, int]:
    return min(image.width, side), min(image.height, side)


def _hash(grey: NDArray[np.float64]) -> int:
    """Of `(32, 32)` grey levels."""
    transform = _cosines()
    found = transform @ grey @ transform.T
    # What is symmetric about both axes has no odd frequencies: 15 bits would be left, and unlike pictures be alike.
    block = found[::2, ::2] if _odd_share(found[:_KEPT, :_KEPT]) < _AS_GOOD_AS_SYMMETRIC else found[:_KEPT, :_KEPT]
    lowest = block.ravel()[1:]  # (63,): all but the mean
    lowest[np.abs(lowest) < _AS_GOOD_AS_ZERO * np.abs(lowest).max()] = 0
    # The mean is above any median: its bit is 1 in every image with structure, and no such hash is FEATURELESS.
    bits = np.append(True, lowest > np.median(lowest))
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _odd_share(block: NDArray[np.float64]) -> float:
    """Norm of the coefficients of an odd frequency, as a share of all but the mean."""
    odd = block.copy()
    odd[::2, ::2] = 0
    return float(np.linalg.norm(odd) / np.linalg.norm(block.ravel()[1:]))


def _cosines() -> NDArray[np.float64]:
    """`(16, 32)`: the rows of the DCT-II of 32 points that belong to its 16 lowest frequencies."""
    frequencies, points = np.arange(2 * _KEPT)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * frequencies * (2 * points + 1) / (2 * _SIDE))
