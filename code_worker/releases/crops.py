"""Seeded crops for comparing encoders: a few of every kind of content, none of anybody's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from code_worker.types import IMAGE_SIZE

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

__all__ = ["seeded_crops"]


def seeded_crops(count: int, seed: int = 0, *, first: int = 0) -> NDArray[np.uint8]:
    """`(count, 224, 224, 3) uint8`: three photograph-like crops, then one synthetic, and so on.

    Crop i depends on `seed` and i alone: `first` continues a set where a shorter one ended.
    """
    crops = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for row, index in enumerate(range(first, first + count)):
        rng = np.random.default_rng((seed, index))
        crops[row] = _synthetic(rng) if index % 4 == 3 else _photograph_like(rng)
    return crops


def _photograph_like(rng: Generator) -> NDArray[np.uint8]:
    """Noise with the 1/f amplitude spectrum of natural images, colours correlated as in photographs."""
    slope = rng.uniform(0.8, 1.6)
    luminance = _pink(rng, slope)
    chroma = np.stack([_pink(rng, slope + 0.3) for _ in range(3)], axis=-1)
    contrast, brightness = rng.uniform(20, 70), rng.uniform(60, 190)
    grain = rng.normal(0, rng.uniform(0, 6), chroma.shape)
    return _to_bytes(brightness + contrast * (luminance[..., None] + 0.35 * chroma) + grain)


def _pink(rng: Generator, slope: float) -> NDArray[np.float64]:
    frequency = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.rfftfreq(IMAGE_SIZE)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE))) / frequency**slope
    field = np.fft.irfft2(spectrum, s=(IMAGE_SIZE, IMAGE_SIZE))
    return np.asarray(field / field.std())


def _synthetic(rng: Generator) -> NDArray[np.uint8]:
    """What cameras do not make: flat areas, ramps, white noise, black padding."""
    kind = rng.integers(4)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if kind == 0:
        return np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), shape)
    if kind == 1:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / (IMAGE_SIZE - 1)
    ramp = rng.uniform(-255, 255, 3) * rows[..., None] + rng.uniform(-255, 255, 3) * columns[..., None]
    filled = _to_bytes(ramp + rng.uniform(0, 255, 3))
    if kind == 3:
        filled[: int(rng.integers(1, IMAGE_SIZE // 2))] = 0
    return filled


def _to_bytes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
