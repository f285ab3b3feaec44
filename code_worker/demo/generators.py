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


def _nearest(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Each pixel of a smaller picture repeated 2, 3 or 4 times."""
    factor = int(rng.integers(2, 5))
    small = _shrunk(pixels, factor)
    return _fitted(np.repeat(np.repeat(small, factor, axis=0), factor, axis=1), pixels.shape)


def _bilinear(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A smaller picture enlarged 2 to 4 times by linear interpolation: no detail is left."""
    from PIL import Image  # only the demonstration's images need it here

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


def _sharpened(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A smaller picture enlarged 2 to 3 times by Lanczos' kernel and sharpened, as upscalers do."""
    from PIL import Image, ImageFilter

    height, width, _ = pixels.shape
    factor = rng.uniform(2, 3)
    small = Image.fromarray(pixels).resize((round(width / factor), round(height / factor)), Image.Resampling.BOX)
    large = small.resize((width, height), Image.Resampling.LANCZOS)
    percent = int(rng.integers(80, 161))
    return np.asarray(large.filter(ImageFilter.UnsharpMask(radius=2, percent=percent, threshold=0)))


def _quantised(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Returns what differs from a blurred picture, quantised in blocks of 8×8.

    The residual of a learned codec or decoder.
    """
    from PIL import Image, ImageFilter

    image = Image.fromarray(pixels)
    smooth = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float64)
    step = rng.uniform(10, 20)
    coefficients = _in_blocks(pixels - smooth, _COSINES)
    residual = _in_blocks(np.rint(coefficients / step) * step, _COSINES.T)
    return np.asarray(np.clip(np.rint(smooth + residual), 0, 255), dtype=np.uint8)


def _in_blocks(values: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """`M·block·Mᵀ` for each whole 8×8 block of each channel; what is left at the edges becomes 0."""
    out = np.zeros_like(values)
    rows, columns = values.shape[0] // 8, values.shape[1] // 8
    blocks = values[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8, 3)
    out[: rows * 8, : columns * 8] = np.einsum("ij,ajbkc,lk->aiblc", matrix, blocks, matrix).reshape(
        rows * 8, columns * 8, 3
    )
    return out


def _cosines() -> NDArray[np.float64]:
    """The orthonormal 8×8 DCT-II."""
    positions = np.arange(8)
    waves = np.cos(np.pi * (2 * positions[None] + 1) * positions[:, None] / 16) / 2
    waves[0] /= np.sqrt(2)
    return waves


def _woven(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A faint weave of period 3 or 4, as a decoder leaves whose filters respond to their own grid."""
    height, width, _ = pixels.shape
    period, depth = int(rng.integers(3, 5)), rng.uniform(2.5, 5)
    rows, columns = np.mgrid[0:height, 0:width]
    weave = depth * np.cos(2 * np.pi * rows / period) * np.cos(2 * np.pi * columns / period)
    return np.asarray(np.clip(np.rint(pixels + weave[..., None]), 0, 255), dtype=np.uint8)


def _dotted(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Faint dots, every other pixel brighter as on a chessboard: phases of a sub-pixel convolution that disagree.

    Aitken et al., "Checkerboard artifact free sub-pixel convolution" (arXiv 1707.02937).
    """
    height, width, _ = pixels.shape
    rows, columns = np.mgrid[0:height, 0:width]
    dots = rng.uniform(4, 8) * (1 - 2 * ((rows + columns) % 2))
    return np.asarray(np.clip(np.rint(pixels + dots[..., None]), 0, 255), dtype=np.uint8)


def _shrunk(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    from PIL import Image

    height, width, _ = pixels.shape
    size = (-(-width // factor), -(-height // factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _fitted(pixels: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels[: shape[0], : shape[1]])


_COSINES: Final = _cosines()

GENERATORS: Final[dict[str, Simulation]] = {
    "toy-nearest": _nearest,
    "toy-bilinear": _bilinear,
    "toy-checkerboard": _checkerboard,
    "toy-sharpened": _sharpened,
}
"""What the starter encoder was trained on."""

NEWCOMERS: Final[dict[str, Simulation]] = {
    "toy-woven": _woven,
    "toy-quantised": _quantised,
    "toy-dotted": _dotted,
}
"""What it has never seen."""

NEWCOMER: Final = "toy-dotted"
"""The one that appears in the second act; of the three it is learned soonest."""
