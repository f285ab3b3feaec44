"""Toy "generators": photographs shrunk and enlarged again, which leaves traces as real upsampling layers do.

Durall et al., "Watch your Up-Convolution" (CVPR 2020), and Odena et al., "Deconvolution and Checkerboard Artifacts"
(Distill 2016), describe the traces. Nothing here generates anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    Simulation = Callable[[NDArray[np.uint8], Generator], NDArray[np.uint8]]

__all__ = ["GENERATORS"]


def _nearest(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Each pixel of a smaller picture repeated 2, 3 or 4 times."""
    factor = int(rng.integers(2, 5))
    small = _shrunk(pixels, factor)
    return _fitted(np.repeat(np.repeat(small, factor, axis=0), factor, axis=1), pixels.shape)


def _bilinear(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A smaller picture enlarged 2 to 4 times by linear interpolation: no detail is left."""
    from PIL import Image  # noqa: PLC0415 - only the demonstration's images need it here

    height, width, _ = pixels.shape
    small = Image.fromarray(_shrunk(pixels, int(rng.integers(2, 5))))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def _checkerboard(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A transposed convolution whose kernel (3) is no multiple of its stride (2): pixels overlap unevenly."""
    small = _shrunk(pixels, 2).astype(np.float64)
    # Sums to 1 over both phases; were the outer taps half the middle one, nothing would overlap unevenly.
    outer = rng.uniform(0.6, 0.7)
    kernel = np.array([outer, 1.5 - outer, outer])
    for axis in (0, 1):
        small = _transposed(small, kernel, axis)
    return _fitted(np.clip(np.rint(small), 0, 255).astype(np.uint8), pixels.shape)


def _transposed(values: NDArray[np.float64], kernel: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    moved = np.moveaxis(values, axis, 0)
    out = np.zeros((2 * len(moved) + 1, *moved.shape[1:]))
    for tap, weight in enumerate(kernel):
        out[tap : tap + 2 * len(moved) : 2] += weight * moved
    return np.moveaxis(out, 0, axis)


def _shrunk(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    from PIL import Image  # noqa: PLC0415 - as above

    height, width, _ = pixels.shape
    size = (-(-width // factor), -(-height // factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _fitted(pixels: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels[: shape[0], : shape[1]])


GENERATORS: Final[dict[str, Simulation]] = {
    "toy-nearest": _nearest,
    "toy-bilinear": _bilinear,
    "toy-checkerboard": _checkerboard,
}
