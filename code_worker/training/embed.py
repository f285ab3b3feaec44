"""From labelled images to embeddings: read, hash, reuse, decode and encode, overlapping, bounded and in order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.data.datasets.examples import Skipped
from code_worker.errors import DatasetError, ImageRejectedError, SourceCredentialsError, StorageError, TransientError
from code_worker.images.decode import decode_crop
from code_worker.moderation.vectors import pack, unpack
from code_worker.types import EMBEDDING_DIM
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
"""Images whose bytes are in memory together; two pages are on their way at a time."""


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
        examples: read as the work proceeds, at most two pages ahead.
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
    pool = ThreadPoolExecutor(threads, thread_name_prefix="embed")
    work = _Work(pool, embedder, crop or (lambda data: decode_crop(data, limits)), known, keep)
    try:
        for page in _one_ahead(work.read(page) for page in chunks(examples, _PAGE)):
            work.encode(page)
            # The page before it is waited for while this one is encoded.
            progress(work.settle(pages_left=1))
        progress(work.settle(pages_left=0))
    finally:
        pool.shutdown(cancel_futures=True)
    return work.result()


@dataclass(slots=True)
class _Entry:
    """An example on its way; `content` or the hash alone, where that sufficed, or why it is skipped."""

    example: Example
    reading: Future[tuple[bytes, str]] | None = None
    sha256: str = ""
    problem: str = ""


class _Work:
    """The state of one call: what became of each content."""

    def __init__(
        self, pool: ThreadPoolExecutor, embedder: Embedder, crop: MakeCrop, known: Known | None, keep: Keep | None
    ) -> None:
        self._pool = pool
        self._embedder = embedder
        self._crop = crop
        self._known = known or (lambda _: {})
        self._keep = keep or (lambda _: None)
        self._reused = known is not None
        self._entries: list[_Entry] = []
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._problems: dict[str, str] = {}
        self._encoding: deque[tuple[int, dict[str, Future[Future[NDArray[np.float32]]]]]] = deque()

    def read(self, page: Sequence[Example]) -> list[_Entry]:
        """Begins to read a page, without those whose vectors are there already."""
        if self._reused:
            self._look_up([example.sha256 for example in page if example.sha256 is not None])
        entries = []
        for example in page:
            if example.sha256 in self._vectors:
                entries.append(_Entry(example, sha256=example.sha256 or ""))
            else:
                entries.append(_Entry(example, self._pool.submit(_read, example)))
        return entries

    def encode(self, page: Sequence[_Entry]) -> None:
        """Waits for a page's bytes and sends what is new to the encoder."""
        contents: dict[str, bytes] = {}
        for entry in page:
            if (content := _content(entry)) is not None:
                contents.setdefault(entry.sha256, content)
        new = [sha256 for sha256 in contents if sha256 not in self._vectors and not self._is_under_way(sha256)]
        if self._reused:
            self._look_up(new)
        started = {
            sha256: self._pool.submit(self._submit, contents[sha256]) for sha256 in new if sha256 not in self._vectors
        }
        self._entries.extend(page)
        self._encoding.append((len(page), started))

    def settle(self, pages_left: int) -> int:
        """Takes the embeddings of all pages but the last `pages_left`; returns how many images these were."""
        done = 0
        while len(self._encoding) > pages_left:
            images, started = self._encoding.popleft()
            fresh = {}
            for sha256, future in started.items():
                if (vector := self._vector(sha256, future)) is not None:
                    fresh[sha256] = pack(vector)
            if fresh:
                self._keep(fresh)
            done += images
        return done

    def result(self) -> Embedded:
        """Returns what came out, in the order of the examples."""
        good = [entry for entry in self._entries if entry.sha256 in self._vectors]
        bad = [entry for entry in self._entries if entry.sha256 not in self._vectors]
        rows = [self._vectors[entry.sha256] for entry in good]
        return Embedded(
            examples=tuple(replace(entry.example, sha256=entry.sha256) for entry in good),
            embeddings=np.stack(rows) if rows else np.empty((0, EMBEDDING_DIM), np.float32),
            skipped=tuple(Skipped(entry.example.key, entry.problem or self._problems[entry.sha256]) for entry in bad),
        )

    def _submit(self, data: bytes) -> Future[NDArray[np.float32]]:
        return self._embedder.submit(self._crop(data))

    def _look_up(self, hashes: Sequence[str]) -> None:
        missing = [sha256 for sha256 in dict.fromkeys(hashes) if sha256 not in self._vectors]
        if missing:
            self._vectors |= unpack(self._known(missing))

    def _is_under_way(self, sha256: str) -> bool:
        return sha256 in self._problems or any(sha256 in started for _, started in self._encoding)

    def _vector(self, sha256: str, future: Future[Future[NDArray[np.float32]]]) -> NDArray[np.float32] | None:
        try:
            vector = future.result().result()
        except ImageRejectedError as error:
            self._problems[sha256] = str(error)
            return None
        if not np.isfinite(vector).all():
            self._problems[sha256] = "the encoder gave numbers that are not finite"
            return None
        self._vectors[sha256] = vector
        return vector


def _read(example: Example) -> tuple[bytes, str]:
    data = example.read()
    return data, hashlib.sha256(data).hexdigest()


def _content(entry: _Entry) -> bytes | None:
    """The bytes that were read for an entry; notes its hash, or why there are none."""
    if entry.reading is None:
        return None
    try:
        data, sha256 = entry.reading.result()
    except (SourceCredentialsError, StorageError):
        # Every other image of the source would fail as well.
        raise
    except (DatasetError, ImageRejectedError, TransientError) as error:
        entry.problem = str(error)
        return None
    finally:
        # The future would keep the bytes alive.
        entry.reading = None
    if entry.example.sha256 not in {None, sha256}:
        entry.problem = f"its bytes have the sha256 {sha256}, not {entry.example.sha256} as was said of it"
        return None
    entry.sha256 = sha256
    return data


def _one_ahead(pages: Iterator[list[_Entry]]) -> Iterator[list[_Entry]]:
    """The same pages; each is handed out when the next one is being read already."""
    ready: list[_Entry] | None = None
    for page in pages:
        if ready is not None:
            yield ready
        ready = page
    if ready is not None:
        yield ready
