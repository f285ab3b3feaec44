"""Photographs that packages ship, in two sets that share none: one to learn from, one to measure on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

__all__ = ["HELD_OUT", "LEARNED_FROM", "Album"]

LEARNED_FROM = (
    "skimage/data/astronaut.png",
    "skimage/data/brick.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/grass.png",
    "skimage/data/ihc.png",
    "skimage/data/moon.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/retina.jpg",
    "skimage/data/rocket.jpg",
)
# The demonstration's two are among these: what it shows is then no memory of theirs.
HELD_OUT = (
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/camera.png",
    "skimage/data/coins.png",
    "skimage/data/gravel.png",
    "skimage/data/hubble_deep_field.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)
_LEAST_DETAIL = 10.0
_FILTERS = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


class Album:
    """Pieces of photographs, at native resolution or reduced as cameras and sites reduce them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.photographs = {name: np.asarray(Image.open(_path(name)).convert("RGB")) for name in names}

    def piece(self, rng: Generator, size: int) -> tuple[str, NDArray[np.uint8]]:
        """The photograph's name and a `(size, size, 3) uint8` piece of it, perhaps mirrored.

        A piece without detail, such as sky, shows no trace of anything either: up to five others are tried.
        """
        for _ in range(5):
            name, pixels = self._cut(rng, size)
            if pixels.std(axis=(0, 1)).max() > _LEAST_DETAIL:
                break
        return name, pixels

    def _cut(self, rng: Generator, size: int) -> tuple[str, NDArray[np.uint8]]:
        names = list(self.photographs)
        name = names[rng.integers(len(names))]
        whole = self.photographs[name]
        scale = 1.0 if rng.random() < 0.5 else max(rng.uniform(0.4, 1), size / min(whole.shape[:2]))
        side = min(round(size / scale), *whole.shape[:2])
        top, left = (int(rng.integers(length - side + 1)) for length in whole.shape[:2])
        cut = Image.fromarray(whole[top : top + side, left : left + side])
        pixels = np.asarray(cut if side == size else cut.resize((size, size), _FILTERS[rng.integers(3)]))
        return name, np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def _path(name: str) -> Path:
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} comes with the package {package}: pip install 'code-worker[bench]'")
    return Path(spec.origin).parent / rest
