"""The images of a snapshot through one encoder: embeddings, looked up where these bytes were encoded before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.data.examples import Example, Skipped
from code_worker.errors import DatasetError, StorageError, TrainingError
from code_worker.moderation.lazy import LazyEmbedder
from code_worker.moderation.load import embedding_key, start_encoder
from code_worker.store import embeddings, personal
from code_worker.training.embed import embed_examples
from code_worker.training.robustness import CLEAN, PRESETS, Condition, make_crop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.kept import KeptImages
    from code_worker.encoder.weights import EncoderWeights
    from code_worker.moderation.runtime import Embedder
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store
    from code_worker.training.snapshot import Member

__all__ = ["CONDITIONS", "Encoder", "Rows", "Seen", "check_readable", "example_of", "matrix", "open_encoder"]

CONDITIONS: Final = (CLEAN, PRESETS["delivery"][1])
"""Under which candidate and champion are compared: as the files are, and as a feed delivers them."""
Rows = Mapping[str, "NDArray[np.float32]"]
"""Content hash → `(192,) float32`."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Embeddings of those images that could be read, and the others with the reason."""

    rows: Rows
    skipped: tuple[Skipped, ...]


def matrix(members: Sequence[Member], rows: Rows) -> NDArray[np.float32]:
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


class Encoder:
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
    ) -> Seen:
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
    ) -> Seen:
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
        return Seen({example.sha256 or "": row for example, row in pairs}, done.skipped)

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
) -> Iterator[Encoder]:
    """The encoder on its device, from the first image that must be encoded until the block ends.

    Embeddings are kept by `write`, see `Encoder`.

    Raises:
        ConfigurationError: a device or precision that this machine lacks.
    """
    with closing(LazyEmbedder(partial(start_encoder, weights, settings))) as embedder:
        key = embedding_key(encoder_sha256, settings.precision)
        yield Encoder(embedder, key=key, settings=settings, store=store, kept=kept, write=write)


def check_readable(members: Sequence[Member], seen: Seen) -> None:
    """Whether enough of a snapshot is still there to speak for all of it.

    Raises:
        DatasetError: less than half of its images can be read; the text quotes one reason.
    """
    if 2 * len(seen.rows) < len(members):
        reason = seen.skipped[0].reason if seen.skipped else "they are gone"
        raise DatasetError(
            f"{len(members) - len(seen.rows)} of {len(members)} labelled images cannot be read, one because: {reason}"
        )
