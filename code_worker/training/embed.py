"""From labelled images to embeddings, through the pipeline that judges: each content once, in order, bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.data.datasets.examples import Skipped
from code_worker.errors import DatasetError, ImageRejectedError, SourceCredentialsError, StorageError, TransientError
from code_worker.moderation.image_tasks import Item
from code_worker.moderation.pipeline import Collector
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.vectors import unpack
from code_worker.types import EMBEDDING_DIM, Fetched, Job
from code_worker.wire import chunks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.datasets.examples import Example
    from code_worker.moderation.runtime import Embedder
    from code_worker.settings import LimitSettings

Known = Callable[[Sequence[str]], Mapping[str, bytes]]
"""Content hashes → vectors (192 little-endian float32) of those that this encoder has embedded before."""
Keep = Callable[[Mapping[str, bytes]], object]
"""Takes vectors computed now, by content hash."""
MakeCrop = Callable[[bytes], "NDArray[np.uint8]"]
"""A file's bytes → `(224, 224, 3) uint8`; raises ImageRejectedError."""

_PAGE: Final = 64
"""Images that are looked up, kept and counted together; two pages are on their way at a time."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Labelled images with their embeddings.

    Attributes:
        examples: those that could be embedded, in their order, each with its sha256.
        embeddings: `(n, 192) float32`, row i of `examples[i]`.
        skipped: all others, and why.
    """

    examples: tuple[Example, ...]
    embeddings: NDArray[np.float32]
    skipped: tuple[Skipped, ...]


def embed_examples(
    examples: Iterable[Example],
    embedder: Embedder,
    limits: LimitSettings,
    *,
    known: Known | None = None,
    keep: Keep | None = None,
    crop: MakeCrop | None = None,
    threads: int = 4,
    progress: Callable[[int], object] = lambda _: None,
) -> Embedded:
    """Embeds every image that can be, each content once; what cannot be read or decoded is skipped with a reason.

    Args:
        examples: read as the work proceeds, at most three pages of 64 ahead.
        embedder: the encoder.
        limits: what an image may cost.
        known: where vectors of earlier runs are; an image whose hash is known beforehand is then not even read.
        keep: where new vectors go, a page at a time.
        crop: makes the crop instead of `images.decode`; nothing is looked up or kept then.
        threads: images read and decoded at the same time.
        progress: hears how many more images are done.

    Raises:
        TransientError: the encoder's device failed; or the source's credentials (SourceCredentialsError).
        StorageError: the dataset storage cannot be read at all.
    """
    if crop is not None:
        known = keep = None
    work = _Work(embedder, known, keep, progress)
    with PriorityPool(threads, "embed") as pool:
        decode_bytes = None if crop is None else partial(_without_facts, crop)
        collector = Collector(work, pool, limits, None if known is None else work.known, decode_bytes)
        try:
            for item in collector.embeddings(work.jobs(examples), work, at_most=2 * _PAGE):
                work.take(item)
            work.settle()
        finally:
            # What is queued in the pool then ends at once.
            work.ended = work.ended or StorageError("the work has ended")
    return work.result()


@dataclass(slots=True)
class _Entry:
    """An example, the hash of its content, and why it is skipped."""

    example: Example
    sha256: str = ""
    problem: str = ""


class _Work:
    """The state of one call: what became of each example; a source of bytes and an encoder for the pipeline.

    All but `fetch` runs on the thread that called.
    """

    encoder_sha256 = ""

    def __init__(
        self, embedder: Embedder, known: Known | None, keep: Keep | None, progress: Callable[[int], object]
    ) -> None:
        self.embedder = embedder
        self.ended: Exception | None = None
        self._known = known
        self._keep = keep or (lambda _: None)
        self._progress = progress
        self._entries: list[_Entry] = []
        self._settled = 0
        self._asked: set[str] = set()
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._fresh: dict[str, bytes] = {}

    def jobs(self, examples: Iterable[Example]) -> Iterator[Job]:
        """One job for each example whose vector is not there already; its URI is the number of the entry."""
        # Read by the pipeline as it has room, at most a page ahead of what was begun.
        for page in chunks(examples, _PAGE):
            self._look_up([example.sha256 for example in page if example.sha256 is not None])
            for example in page:
                self._entries.append(_Entry(example, example.sha256 or ""))
                if example.sha256 not in self._vectors:
                    yield Job(id=example.key, uri=str(len(self._entries) - 1))

    def fetch(self, uri: str) -> Fetched:
        """Reads an example's bytes, on a thread of the pool."""
        if self.ended is not None:
            raise self.ended
        try:
            return Fetched(self._entries[int(uri)].example.read())
        except (SourceCredentialsError, StorageError) as error:
            # Every other image of the source would fail as well, and take its time for it.
            self.ended = error
            raise

    def known(self, _: str, hashes: Sequence[str]) -> Mapping[str, bytes]:
        """Vectors of contents whose hashes became known by reading them."""
        new = [sha256 for sha256 in hashes if sha256 not in self._asked]
        return self._known(new) if self._known is not None and new else {}

    def take(self, item: Item) -> None:
        """Notes what became of one example.

        Raises:
            TransientError, StorageError: see `embed_examples`.
        """
        entry = self._entries[number := int(item.job.uri)]
        if item.error is not None:
            entry.problem = _reason(item, item.error)
        elif item.facts is not None and item.embedding is not None:
            if entry.sha256 not in {"", item.facts.sha256}:
                entry.problem = f"its bytes have the sha256 {item.facts.sha256}, not {entry.sha256} as was said of it"
                return
            entry.sha256 = item.facts.sha256
            self._vectors[entry.sha256] = item.embedding
            if item.fresh is not None:
                self._fresh[entry.sha256] = item.fresh
                # The pipeline keeps the item for others with its bytes: they need the embedding alone.
                item.fresh = None
        if number - self._settled >= _PAGE:
            self.settle(number)

    def settle(self, number: int | None = None) -> None:
        """Keeps the vectors of all entries before this one, and counts them."""
        end = len(self._entries) if number is None else number
        if self._fresh:
            self._keep(self._fresh)
            self._fresh = {}
        self._progress(end - self._settled)
        self._settled = end

    def result(self) -> Embedded:
        """Returns what came out, in the order of the examples."""
        good = [entry for entry in self._entries if not entry.problem]
        rows = [self._vectors[entry.sha256] for entry in good]
        return Embedded(
            examples=tuple(replace(entry.example, sha256=entry.sha256) for entry in good),
            embeddings=np.stack(rows) if rows else np.empty((0, EMBEDDING_DIM), np.float32),
            skipped=tuple(Skipped(entry.example.key, entry.problem) for entry in self._entries if entry.problem),
        )

    def _look_up(self, hashes: Sequence[str]) -> None:
        if self._known is None:
            return
        if missing := [sha256 for sha256 in dict.fromkeys(hashes) if sha256 not in self._vectors]:
            self._vectors |= unpack(self._known(missing))
            # Looked for and not found: after reading, the pipeline need not ask for these again.
            self._asked.update(missing)


def _without_facts(crop: MakeCrop, data: bytes) -> tuple[NDArray[np.uint8], None]:
    return crop(data), None


def _reason(item: Item, error: BaseException) -> str:
    """Returns why an example is skipped; raises what is not of the example alone."""
    ends = isinstance(error, SourceCredentialsError | StorageError) or (
        item.encoding and isinstance(error, TransientError)
    )
    if ends or not isinstance(error, DatasetError | ImageRejectedError | TransientError):
        raise error
    return str(error)
