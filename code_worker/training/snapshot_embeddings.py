"""Embeddings of the images of a snapshot, looked up where the same bytes were encoded before; also for notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.data.datasets.examples import Example, Skipped
from code_worker.data.kept_copies import open_kept
from code_worker.errors import DatasetError, NoReleaseError, StorageError, TrainingError
from code_worker.moderation.runtime import LazyEmbedder, embedding_key, start_encoder
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.store import embeddings, migrate
from code_worker.store.erasure import personal
from code_worker.training import snapshot as snapshots
from code_worker.training.embed import embed_examples
from code_worker.training.evaluation.robustness import CLEAN, PRESETS, Condition, make_crop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.kept_copies import KeptImages
    from code_worker.encoder.weights import EncoderWeights
    from code_worker.moderation.runtime import Embedder
    from code_worker.store.engine import Session, Store
    from code_worker.training.snapshot import Member


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingsByCondition:
    """The snapshot through one encoder under every condition: first all members, then what is judged."""

    rows: Mapping[str, EmbeddingsByHash]
    skipped: Sequence[Skipped]

    @property
    def clean(self) -> EmbeddingsByHash:
        """The embeddings of the files as they are."""
        return self.rows[CONDITIONS[0].key]


CONDITIONS: Final = (CLEAN, PRESETS["delivery"][1])
"""Under which candidate and champion are compared: as the files are, and as a feed delivers them."""
EmbeddingsByHash = Mapping[str, "NDArray[np.float32]"]
"""Content hash → `(192,) float32`."""


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotEmbeddings:
    """Embeddings of those images that could be read, and the others with the reason."""

    rows: EmbeddingsByHash
    skipped: tuple[Skipped, ...]


def embedding_matrix(members: Sequence[Member], rows: EmbeddingsByHash) -> NDArray[np.float32]:
    """`(n, 192) float32` in the order of the members, all of which must have a row."""
    found = [rows[member.sha256] for member in members]
    return np.stack(found) if found else np.empty((0, 192), np.float32)


def example_of(member: Member, kept: KeptImages) -> Example:
    """The member as an image of a data set, read from its kept copy.

    A storage that cannot be read at all is a TrainingError then, so that no single image is to blame.
    """
    return Example(
        key=member.sha256,
        label=member.label,
        read=partial(_read, kept, member.sha256),
        generator=member.generator,
        collection=member.collection,
        sha256=member.sha256,
    )


def _read(kept: KeptImages, sha256: str) -> bytes:
    try:
        return kept.read(sha256)
    except StorageError as error:
        raise TrainingError(f"the labelled images cannot be read: {error}") from error


class SnapshotEncoder:
    """One encoder over the kept copies of labelled images."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        key: str,
        settings: Settings,
        store: Store,
        kept: KeptImages,
        write: Callable[[Callable[[Session], None]], None] | None = None,
    ) -> None:
        """Takes what it embeds with; `write`: runs a unit of work, unless a run is not this process's any more."""
        self._write = write or store.run
        self._since = store.run(personal.moment, write=False)
        self._embedder = embedder
        self._key = key
        self._settings = settings
        self._store = store
        self._kept = kept

    def see(
        self,
        members: Sequence[Member],
        condition: Condition = CLEAN,
        progress: Callable[[int], object] = lambda _: None,
    ) -> SnapshotEmbeddings:
        """Embeds the members' kept copies; without a transform these embeddings are kept for later.

        Raises:
            TrainingError: the dataset storage cannot be read at all, so that no image is to blame.
            TransientError: the device failed.
        """
        return self.see_examples((example_of(member, self._kept) for member in members), condition, progress)

    def see_examples(
        self,
        examples: Iterable[Example],
        condition: Condition = CLEAN,
        progress: Callable[[int], object] = lambda _: None,
    ) -> SnapshotEmbeddings:
        """The same for images of any data set.

        Raises:
            TrainingError, TransientError: see `see`.
        """
        transform = condition.transform
        done = embed_examples(
            examples,
            self._embedder,
            self._settings.limits,
            known=self._known,
            keep=self._keep,
            crop=None if transform is None else make_crop(transform, self._settings.limits),
            threads=self._settings.worker.fetch_threads,
            progress=progress,
        )
        pairs = zip(done.examples, done.embeddings, strict=True)
        return SnapshotEmbeddings({example.sha256 or "": row for example, row in pairs}, done.skipped)

    def _known(self, hashes: Sequence[str]) -> Mapping[str, bytes]:
        return self._store.run(lambda session: embeddings.known(session, self._key, hashes), write=False)

    def _keep(self, vectors: Mapping[str, bytes]) -> None:
        if self._settings.worker.store_embeddings:
            # An image may have been erased while it was encoded.
            self._write(lambda session: embeddings.keep(session, self._key, vectors, since=self._since))


@contextmanager
def open_encoder(
    weights: EncoderWeights,
    encoder_sha256: str,
    *,
    settings: Settings,
    store: Store,
    kept: KeptImages,
    write: Callable[[Callable[[Session], None]], None] | None = None,
) -> Iterator[SnapshotEncoder]:
    """The encoder on its device, from the first image that must be encoded until the block ends.

    Embeddings are kept by `write`, see `SnapshotEncoder`.

    Raises:
        ConfigurationError: a device or precision that this machine lacks.
    """
    with closing(LazyEmbedder(partial(start_encoder, weights, settings))) as embedder:
        key = embedding_key(encoder_sha256, settings.precision)
        yield SnapshotEncoder(embedder, key=key, settings=settings, store=store, kept=kept, write=write)


def check_readable(members: Sequence[Member], seen: SnapshotEmbeddings) -> None:
    """Checks that enough of a snapshot is still there to speak for all of it.

    Raises:
        DatasetError: less than half of its images can be read; the text quotes one reason.
    """
    if 2 * len(seen.rows) < len(members):
        reason = seen.skipped[0].reason if seen.skipped else "they are gone"
        raise DatasetError(
            f"{len(members) - len(seen.rows)} of {len(members)} labelled images cannot be read, one because: {reason}"
        )


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
    """Returns embeddings, by a release's encoder, of labelled images that a run would learn from, or of the hold-out.

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
        embeddings=embedding_matrix(found, seen.rows),
        labels=np.array([member.label for member in found], dtype=np.int8),
        sha256=tuple(member.sha256 for member in found),
        generators=tuple(member.generator for member in found),
    )
