"""The toy release that tests judge with: heads that tell white noise from enlarged noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from code_worker.plugins import load_plugins
from code_worker.releases.building import build_toy_release
from code_worker.settings import Settings


def toy_crops(count: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """`(count, 224, 224, 3) uint8` and labels: noise is real (0), noise enlarged four times generated (1)."""
    rng = np.random.default_rng(seed)
    crops = rng.integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    labels = (np.arange(count) % 2).astype(np.int8)
    coarse = crops[labels == 1, ::4, ::4]
    crops[labels == 1] = coarse.repeat(4, axis=1).repeat(4, axis=2)
    return crops, labels


def write_toy_release(directory: Path, *, seed: int = 0, depth: int = 2, images: int = 24) -> Path:
    """Writes a release with the heads linear, knn and svm into the new directory.

    Two blocks instead of the published twelve are enough for everything but sizes and speeds.
    """
    crops, labels = toy_crops(images, seed)
    build_toy_release(directory, crops, labels, load_plugins(Settings()), seed=seed, depth=depth)
    return directory
