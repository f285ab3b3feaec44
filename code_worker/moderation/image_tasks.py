"""One image on its way to an embedding, and the work that is done for it on the threads of the pool."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from code_worker.errors import ImageRejectedError, TransientError
from code_worker.types import ImageFacts, Job

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.moderation.runtime import Fetcher
    from code_worker.types import Fetched

DecodeBytes = Callable[[bytes], "tuple[NDArray[np.uint8], ImageFacts | None]"]
"""A file's bytes → `(224, 224, 3) uint8`, and facts if any; raises ImageRejectedError or TransientError."""
_SMALL_BYTES = 2**16
"""Hashed in some 40 µs: for that nobody need give the interpreter away."""
_HELD_BYTES = 2047


@dataclass(slots=True, eq=False)
class Item:
    """One job on its way: what is known of it so far."""

    job: Job
    facts: ImageFacts | None = None
    embedding: NDArray[np.float32] | None = None
    fresh: bytes | None = None
    """The embedding as stored, when it was computed now."""
    error: BaseException | None = None
    encoding: bool = False
    """Whether an error came from the encoder rather than from the image."""
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Content:
    """The bytes of an image, and their hash in hexadecimal."""

    fetched: Fetched
    sha256: str


class Task(ABC):
    """A piece of work for the pool, and what went wrong with it; tells its batch when it has ended."""

    __slots__ = ("_ended", "error", "item", "running")

    def __init__(self, item: Item, ended: SimpleQueue[Task]) -> None:
        self.item = item
        self.error: BaseException | None = None
        self.running = False
        self._ended = ended

    def __call__(self) -> None:
        """Does the work, and puts itself among what has ended."""
        self.running = True
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001 - what was raised belongs to the image
            self.error = error
        self._ended.put(self)

    @abstractmethod
    def work(self) -> None:
        """Does the task, on a thread of the pool."""


class Fetch(Task):
    """Gets and hashes the bytes."""

    __slots__ = ("_sources", "content")

    content: Content

    def __init__(self, item: Item, ended: SimpleQueue[Task], sources: Fetcher) -> None:
        super().__init__(item, ended)
        self._sources = sources

    def work(self) -> None:
        """Sets `content`."""
        with _timed(self.item, "fetch"):
            fetched = self._sources.fetch(self.item.job.uri)
            self.content = Content(fetched, _sha256(fetched.data))


class Decode(Task):
    """Turns bytes into the crop."""

    __slots__ = ("_decode_bytes", "content", "crop")

    crop: NDArray[np.uint8]

    def __init__(self, item: Item, ended: SimpleQueue[Task], content: Content, decode_bytes: DecodeBytes) -> None:
        super().__init__(item, ended)
        self.content = content
        self._decode_bytes = decode_bytes

    def work(self) -> None:
        """Sets `crop`, `(224, 224, 3) uint8`, and the item's facts."""
        with _timed(self.item, "decode"):
            self.crop, facts = self._decode_bytes(self.content.fetched.data)
        if facts is not None:
            self.item.facts = with_source(facts, self.content.fetched)


class _timed:  # noqa: N801 - reads as a verb where it is used
    """Adds the milliseconds that its block took to the item's timings."""

    def __init__(self, item: Item, stage: str) -> None:
        self._item, self._stage = item, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._item.timings_ms[self._stage] = round((time.perf_counter() - self._start) * 1000, 3)


def without_frames(error: BaseException) -> BaseException:
    """A refusal says all there is to say; the frames it came through would keep its file until the batch ends."""
    each: BaseException | None = error
    while each is not None and isinstance(error, ImageRejectedError | TransientError):
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error


def _sha256(data: bytes) -> str:
    """Content hash in hexadecimal.

    hashlib lets go of the interpreter for every update of 2 KiB or more, and with small images the threads then spend
    longer on handing it round than on hashing.
    """
    if len(data) > _SMALL_BYTES:
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    for start in range(0, len(data), _HELD_BYTES):
        digest.update(data[start : start + _HELD_BYTES])
    return digest.hexdigest()


def with_source(facts: ImageFacts, fetched: Fetched) -> ImageFacts:
    """Adds the source's own version of the object."""
    return replace(facts, etag=fetched.etag, version_id=fetched.version_id)
