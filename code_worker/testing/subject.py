"""The head under test, what it is tried with, and how a check says what it found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from code_worker.heads import Head
from code_worker.types import EMBEDDING_DIM

__all__ = ["TOLERANCE", "NotConformingError", "Subject", "largest_difference", "sample_embeddings"]

TOLERANCE: Final = 1e-4
"""How far two scores of one embedding may be apart because sums were taken in another order, as they are in a batch.

A float32 sum of n = 192 products is off by n·u·Σ|wᵢxᵢ| at most, u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, eq. 3.5), and a score by a quarter of what its log-odds are off, the logistic function's steepest
slope. Twice that, for products that add up to 17, at which a float32 score becomes 1, is 9.7e-5.
"""
_ROWS: Final = 1000


def sample_embeddings(rows: int = _ROWS, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Embeddings `(rows, 192) float32` that any head can tell apart, and labels `(rows,) int8` (0 real, 1 generated).

    Real ones lie round one point, generated ones round another, at right angles to it.
    """
    real, other = np.random.default_rng(1729).normal(size=(2, EMBEDDING_DIM))
    generated = other - real * (other @ real) / (real @ real)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % 2).astype(np.int8)
    centres = np.where(labels[:, None] == 0, real, generated)
    return (centres + rng.normal(scale=0.5, size=(rows, EMBEDDING_DIM))).astype(np.float32), labels


class NotConformingError(Exception):
    """What a check found."""

    def __init__(self, expected: str, seen: str, fix: str) -> None:
        super().__init__(seen)
        self.expected, self.seen, self.fix = expected, seen, fix


class Subject:
    """The head under test and what it is tried with; inputs are read-only, so that writing to one shows."""

    def __init__(self, head_class: type[Head], options: Mapping[str, Any], directory: Path) -> None:
        self.head_class = head_class
        self.options = options
        self.directory = directory
        self.train, self.train_labels = sample_embeddings(_ROWS, seed=1)
        self.embeddings, self.labels = sample_embeddings(97, seed=2)
        for array in (self.train, self.train_labels, self.embeddings):
            array.flags.writeable = False
        self.head: Head

    def fitted(self) -> Head:
        """A new head, fitted on the training data; one-class heads get its real images only."""
        keep = self.train_labels == 0 if self.head_class.one_class else np.ones(len(self.train), dtype=bool)
        return self.head_class(self.options).fit(self.train[keep], self.train_labels[keep])

    def saved(self, name: str) -> Path:
        """A new directory that `save` has filled."""
        directory = self.directory / name
        directory.mkdir()
        self.head.save(directory)
        return directory


def largest_difference(first: NDArray[Any], second: NDArray[Any]) -> float:
    """The largest absolute difference, 0 for empty arrays."""
    return float(np.abs(first - second).max(initial=0.0))
