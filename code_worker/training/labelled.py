"""The labelled images as embeddings: what a head is fitted on and tried with, for notebooks and scripts."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from code_worker.data.kept import open_kept
from code_worker.errors import NoReleaseError
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.store import migrate
from code_worker.training import snapshot as snapshots
from code_worker.training.encoded import check_readable, matrix, open_encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LabelledEmbeddings", "labelled_embeddings"]


@dataclass(frozen=True, slots=True, eq=False)
class LabelledEmbeddings:
    """Embeddings of labelled images, one row each, by content hash.

    Attributes:
        release: whose encoder made them.
        embeddings: `(n, 192) float32`.
        labels: `(n,) int8`, 0 real, 1 generated.
        sha256: content hash of each image.
        generators: what made each image, where somebody said so.
    """

    release: str
    embeddings: NDArray[np.float32]
    labels: NDArray[np.int8]
    sha256: tuple[str, ...]
    generators: tuple[str | None, ...]


def labelled_embeddings(
    release: str | None = None, *, settings: Settings | None = None, holdout: bool = False
) -> LabelledEmbeddings:
    """What the encoder of a release makes of the labelled images that a run would learn from, or of the hold-out.

    Embeddings that are kept are read, the others computed and kept. Images that cannot be read are left out.

    Args:
        release: id; unset: the champion.
        settings: unset: those of the environment.
        holdout: the images that are never learned from, to measure a head on.

    Raises:
        NoReleaseError: no such release, or no champion.
        ArtifactError, PluginError: the release cannot be loaded here.
        DatasetError: most of the images cannot be read.
        TrainingError: the storage of labelled images cannot be read at all.
    """
    settings = settings or load_settings()
    with closing(migrate.open_current(settings.resolved_database_url)) as store:
        registry = open_registry(settings, store=store, plugins=load_plugins(settings))
        if (wanted := release or registry.champion()) is None:
            raise NoReleaseError("no champion whose encoder could be used: name a release, or promote one")
        loaded = registry.load(wanted)
        taken = store.run(lambda session: snapshots.take(session, settings.labels), write=False)
        members = taken.holdout if holdout else taken.training_share
        weights, digest, kept = loaded.weights, loaded.encoder_sha256, open_kept(settings)
        with open_encoder(weights, digest, settings=settings, store=store, kept=kept) as encoder:
            seen = encoder.see(members)
    check_readable(members, seen)
    found = [member for member in members if member.sha256 in seen.rows]
    return LabelledEmbeddings(
        release=wanted,
        embeddings=matrix(found, seen.rows),
        labels=np.array([member.label for member in found], dtype=np.int8),
        sha256=tuple(member.sha256 for member in found),
        generators=tuple(member.generator for member in found),
    )
