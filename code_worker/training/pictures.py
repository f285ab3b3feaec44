"""Pictures of embeddings, for people who want to see whether a generator lies apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.telemetry import import_without_home

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["draw_embeddings", "project"]

_MOST: Final = 1500


def project(embeddings: NDArray[np.float32], *, seed: int = 0) -> NDArray[np.float32]:
    """`(n, 2) float32`: t-SNE (van der Maaten & Hinton 2008) of `(n, d)` embeddings by cosine distance."""
    from sklearn.manifold import TSNE  # seconds to import, and only some epochs draw

    perplexity = min(30.0, max(2.0, (len(embeddings) - 1) / 3))
    plane = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(embeddings)
    return np.asarray(plane, dtype=np.float32)


def draw_embeddings(
    path: Path, embeddings: NDArray[np.float32], groups: Sequence[str], *, title: str, seed: int = 0
) -> None:
    """Writes a PNG with a dot per image, a colour per generator and grey for real ones.

    Of more than 1,500 images a seeded choice is drawn.
    """
    with import_without_home():
        from matplotlib.figure import Figure

    chosen = np.random.default_rng(seed).permutation(len(groups))[:_MOST]
    plane, names = project(embeddings[chosen], seed=seed), np.array(groups)[chosen]
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for name in sorted(set(names), key=lambda name: (name != "real", name)):
        points = plane[names == name]
        axes.scatter(
            points[:, 0], points[:, 1], s=9, label=f"{name} ({len(points)})", color="0.6" if name == "real" else None
        )
    axes.set(title=title, xticks=[], yticks=[])
    axes.legend(fontsize=8, markerscale=2, framealpha=0.9)
    figure.savefig(path, dpi=110)
