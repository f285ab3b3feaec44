"""An example plugin: how far is an embedding from real images, measured in their own spread?

It learns from real images alone, so it needs no examples of a generator to notice its images. The distance is that of
Mahalanobis (1936), with the covariance shrunk towards a sphere (Ledoit and Wolf, 2004, with a fixed weight): 192
dimensions and a few thousand images leave some directions badly known, and those must not dominate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from code_worker import Head, HeadSpec, Job, hookimpl
from code_worker.errors import ArtifactError
from code_worker.types import EMBEDDING_DIM

__all__ = ["MahalanobisHead", "code_worker_register_heads", "code_worker_select_head"]

_SHAPES = {"mean": (EMBEDDING_DIM,), "whitening": (EMBEDDING_DIM, EMBEDDING_DIM), "border": ()}


@hookimpl
def code_worker_register_heads() -> list[HeadSpec]:
    """Offers the head as `mahalanobis`."""
    return [HeadSpec("mahalanobis", MahalanobisHead, "distance from real images in units of their spread")]


@hookimpl
def code_worker_select_head(job: Job, heads: Sequence[str]) -> str | None:
    """Jobs enqueued with `metadata={"second_opinion": True}` are judged by distance, where the release has it."""
    return "mahalanobis" if job.metadata.get("second_opinion") and "mahalanobis" in heads else None


class MahalanobisHead(Head):
    """`score` is `d / (d + border)`: 0.5 on the border, rising with the distance `d`, and never flat."""

    class Options(Head.Options):
        """Options of the head; the values go into the release's manifest."""

        outliers: float = Field(0.05, gt=0, lt=1, description="Share of the real images that lie outside the border.")
        shrinkage: float = Field(0.1, gt=0, le=1, description="Weight of the sphere in the covariance.")

    one_class: ClassVar = True
    tolerance: ClassVar = 2.0**-24
    """A matrix product in float64 rounds a row differently alone and in a batch; in float32 that is one step."""
    options: Options

    mean: NDArray[np.float64]
    whitening: NDArray[np.float64]
    border: float

    def fit(self, embeddings: NDArray[np.float32], labels: NDArray[np.int8]) -> Self:
        """Learns mean and covariance of real images, and the distance that all but a few stay within.

        Raises:
            ValueError: a label other than 0, fewer than 2 images, or images that do not differ.
        """
        rows = _checked(embeddings)
        if len(rows) < 2 or labels.shape != (len(rows),) or labels.any():
            raise ValueError("at least 2 real images are needed, each with label 0")
        # Distances are shorter for the images that the covariance was learnt from: others must draw the border.
        held_out = np.arange(len(rows)) % 5 == 4 if len(rows) >= 10 else np.zeros(len(rows), dtype=bool)
        self._learn_spread(rows[~held_out])
        border_rows = rows[held_out] if held_out.any() else rows
        self.border = float(np.quantile(self._distance(border_rows), 1 - self.options.outliers))
        return self

    def _learn_spread(self, rows: NDArray[np.float64]) -> None:
        covariance = np.cov(rows, rowvar=False)
        variance = np.trace(covariance) / EMBEDDING_DIM
        if variance == 0:
            raise ValueError("the real images do not differ from one another")
        weight = self.options.shrinkage
        shrunk = (1 - weight) * covariance + weight * variance * np.eye(EMBEDDING_DIM)
        self.mean = rows.mean(axis=0)
        self.whitening = np.linalg.inv(np.linalg.cholesky(shrunk)).T

    def distance(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Mahalanobis distance from the mean of real images, `(n,) float64`."""
        return self._distance(_checked(embeddings))

    def _distance(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.linalg.norm((rows - self.mean) @ self.whitening, axis=1))

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """At least 0.5 outside the border."""
        distance = self.distance(embeddings)
        return (distance / (distance + self.border)).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Writes three plain arrays."""
        np.savez(directory / "head.npz", mean=self.mean, whitening=self.whitening, border=self.border)

    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Self:
        """Reads what `save` wrote.

        Raises:
            ArtifactError: the file is missing, or holds other arrays.
        """
        try:
            with np.load(directory / "head.npz", allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in _SHAPES}
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{directory / 'head.npz'} cannot be read: {error}") from error
        for name, shape in _SHAPES.items():
            if arrays[name].shape != shape or arrays[name].dtype != np.float64 or not np.isfinite(arrays[name]).all():
                raise ArtifactError(f"{directory / 'head.npz'}: {name} must be finite float64 of shape {shape}")
        head = cls(options)
        head.mean, head.whitening, head.border = arrays["mean"], arrays["whitening"], float(arrays["border"])
        return head


def _checked(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    if embeddings.ndim != 2 or embeddings.shape[1] != EMBEDDING_DIM:
        raise ValueError(f"embeddings must have shape (n, {EMBEDDING_DIM}), not {embeddings.shape}")
    if not np.isfinite(embeddings).all():
        raise ValueError("embeddings must be finite")
    return embeddings.astype(np.float64)
