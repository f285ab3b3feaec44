"""A release for demonstrations and tests: real heads, fitted on embeddings of a toy encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from code_worker.heads import fit_head
from code_worker.releases.builder import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights
    from code_worker.plugins import Plugins

__all__ = ["TOY_NOTE", "build_toy_release"]

TOY_NOTE = "TOY: the encoder was never trained; verdicts of this release say nothing about real images."


def build_toy_release(
    directory: Path,
    crops: NDArray[np.uint8],
    labels: NDArray[np.int8],
    plugins: Plugins,
    *,
    seed: int = 0,
    heads: Sequence[str] = ("linear", "knn", "svm"),
    depth: int = 12,
    weights: EncoderWeights | None = None,
    note: str = TOY_NOTE,
) -> str:
    """Writes a toy release into the new directory; returns the manifest's sha256.

    Args:
        directory: where to.
        crops: `(n, 224, 224, 3) uint8`.
        labels: `(n,) int8`, 0 real, 1 generated; both must occur.
        plugins: where the heads come from.
        seed: of the encoder's random weights.
        heads: which heads to fit; one-class heads get the real crops alone.
        depth: blocks of the encoder; 12 is the published size.
        weights: the encoder, instead of one that was never trained.
        note: what the release says of itself.

    Raises:
        UnknownHeadError: a head that no plugin registered.
        ValueError: crops and labels that do not go together.
    """
    from code_worker.encoder.engine import Engine
    from code_worker.encoder.loop import EncoderLoop
    from code_worker.encoder.weights import random_weights

    if len(crops) != len(labels):
        raise ValueError(f"{len(crops)} crops, but {len(labels)} labels")
    encoder = weights or random_weights(seed, depth=depth)
    with EncoderLoop(Engine(encoder, device="cpu"), streams=None, micro_batch=None) as loop:
        embeddings = loop.embed(crops)
    fitted = {name: fit_head(plugins.head_class(name)(), embeddings, labels) for name in heads}
    origin = f"toy, {weights.source}" if weights else f"toy, seed {seed}"
    facts = ReleaseFacts(source=Source(uri=origin), toy=True, notes=note)
    return build_from_parts(directory, encoder, fitted, plugins, facts)
