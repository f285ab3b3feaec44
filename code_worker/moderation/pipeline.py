"""From jobs to embeddings: fetch, hash, reuse, decode and encode, overlapping and bounded."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from code_worker.errors import ImageRejectedError, TransientError
from code_worker.images.decode import decode, inspect
from code_worker.moderation.vectors import pack, unpack
from code_worker.types import ImageFacts, Job, RejectReason

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.moderation.pool import PriorityPool
    from code_worker.moderation.runtime import Fetcher, KnownEmbeddings, Runtime
    from code_worker.settings import LimitSettings
    from code_worker.types import Fetched

_LOOK_S = 5.0
_LINGER_S = 0.01
"""How long an image that has arrived waits for others to be looked up with: a query for each would cost more."""
_SMALL_BYTES = 2**16
"""Hashed in some 40 µs: for that nobody need give the interpreter away."""
_HELD_BYTES = 2047
_SomeTask = TypeVar("_SomeTask", bound="_Task")


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
class _Bytes:
    fetched: Fetched
    sha256: str


class _Task(ABC):
    """A piece of work for the pool, and what went wrong with it; tells its batch when it has ended."""

    __slots__ = ("_ended", "error", "item", "running")

    def __init__(self, item: Item, ended: SimpleQueue[_Task]) -> None:
        self.item = item
        self.error: BaseException | None = None
        self.running = False
        self._ended = ended

    def __call__(self) -> None:
        self.running = True
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001 - what was raised belongs to the image
            self.error = error
        self._ended.put(self)

    @abstractmethod
    def work(self) -> None:
        """Does the task, on a thread of the pool."""


class _Fetch(_Task):
    """Gets and hashes the bytes."""

    __slots__ = ("_sources", "content")

    content: _Bytes

    def __init__(self, item: Item, ended: SimpleQueue[_Task], sources: Fetcher) -> None:
        super().__init__(item, ended)
        self._sources = sources

    def work(self) -> None:
        with _timed(self.item, "fetch"):
            fetched = self._sources.fetch(self.item.job.uri)
            self.content = _Bytes(fetched, _sha256(fetched.data))


class _Decode(_Task):
    """Turns bytes into the crop."""

    __slots__ = ("_limits", "content", "crop")

    crop: NDArray[np.uint8]

    def __init__(self, item: Item, ended: SimpleQueue[_Task], content: _Bytes, limits: LimitSettings) -> None:
        super().__init__(item, ended)
        self.content = content
        self._limits = limits

    def work(self) -> None:
        with _timed(self.item, "decode"):
            self.crop, facts = decode(self.content.fetched.data, self._limits, sha256=self.content.sha256)
        self.item.facts = _with_source(facts, self.content.fetched)


class Observer(Protocol):
    """An observer of a batch: called from the batch's own thread, so it must neither wait nor raise."""

    def saw_bytes(self, sha256: str, data: bytes) -> None:
        """The bytes of an image whose embedding was known, so that it is not decoded."""

    def saw_crop(self, sha256: str, crop: NDArray[np.uint8]) -> None:
        """The `(224, 224, 3) uint8` crop of an image that is encoded now."""

    def saw_embedding(self, sha256: str, embedding: NDArray[np.float32]) -> None:
        """The `(192,) float32` embedding of any image."""


class Collector:
    """Fetches and decodes in the shared pool, a bounded number of objects at a time."""

    def __init__(
        self, sources: Fetcher, pool: PriorityPool, limits: LimitSettings, known: KnownEmbeddings | None
    ) -> None:
        self._sources = sources
        self._pool = pool
        self._limits = limits
        self._known = known
        self.numbers = count()

    def embeddings(
        self, jobs: Sequence[Job], runtime: Runtime, progress: Callable[[], None], observer: Observer | None = None
    ) -> Iterator[Item]:
        """One item per job, in the jobs' order, each with an embedding or an error; calls `progress` on the way."""
        batch = _Batch(self, runtime, progress, observer)
        items = [Item(job) for job in jobs]
        batch.run(items)
        for item in items:
            batch.finish(item)
            progress()
            yield item

    def fetch(self, batch: int, item: Item, ended: SimpleQueue[_Task]) -> _Fetch:
        """Has the bytes of an image fetched."""
        return self._submit(batch, _Fetch(item, ended, self._sources))

    def decode(self, batch: int, item: Item, ended: SimpleQueue[_Task], content: _Bytes) -> _Decode:
        """Has bytes turned into the crop."""
        return self._submit(batch, _Decode(item, ended, content, self._limits))

    def reuse(self, item: Item, content: _Bytes, embedding: NDArray[np.float32]) -> None:
        """Takes over an embedding; the header is read all the same, for the facts and for limits set since."""
        try:
            facts = inspect(content.fetched.data, self._limits, sha256=content.sha256)
            item.facts = _with_source(facts, content.fetched)
        except ImageRejectedError as error:
            item.error = _without_frames(error)
            return
        item.embedding = embedding
        item.timings_ms["reused"] = 1.0

    def known(self, encoder_sha256: str, hashes: Sequence[str]) -> Mapping[str, bytes]:
        """Embeddings of these contents that an earlier job left."""
        return {} if self._known is None else self._known(encoder_sha256, hashes)

    @property
    def group(self) -> int:
        """The number of images to look up at once, where there is anything to look up."""
        return 1 if self._known is None else self._pool.size

    @property
    def window(self) -> int:
        """The number of objects of a batch that may be on their way, so that memory does not grow with the batch."""
        return 2 * self._pool.size

    def _submit(self, batch: int, task: _SomeTask) -> _SomeTask:
        """Queues work for one job: urgent ones first, then older batches, so that batches end one after the other.

        Were batches served in turn, they would all end late together, and a live job would wait for a free slot.
        """
        self._pool.submit((-task.item.job.priority, batch), task)
        return task


class _Batch:
    """The state of one call: what is under way for which item, and what was seen twice."""

    def __init__(
        self, collector: Collector, runtime: Runtime, progress: Callable[[], None], observer: Observer | None
    ) -> None:
        self._collector = collector
        self._runtime = runtime
        self._progress = progress
        self._observer = observer
        self._number = next(collector.numbers)
        # Tasks run on threads of the pool and say here that they ended; all else is of the thread that called alone.
        self._ended: SimpleQueue[_Task] = SimpleQueue()
        self._fetching: set[_Fetch] = set()
        self._arrived: list[_Fetch] = []
        self._look_up_at = 0.0
        self._decoding: set[_Decode] = set()
        self._encoding: dict[Item, Future[NDArray[np.float32]]] = {}
        # By content hash: the first item is decoded and encoded, the others take its embedding over.
        self._twins: dict[str, list[Item]] = {}

    def run(self, items: Sequence[Item]) -> None:
        waiting = deque(items)
        while waiting or self._fetching or self._decoding:
            # Bytes and crops of at most `window` objects are in memory, however long the batch is.
            while waiting and self._held < self._collector.window:
                self._fetching.add(self._collector.fetch(self._number, waiting.popleft(), self._ended))
            done = self._next_ended()
            # Waiting for one's turn behind more urgent images is not being stuck.
            if done or not any(task.running for task in (*self._fetching, *self._decoding)):
                self._progress()
            self._after_fetch([task for task in done if isinstance(task, _Fetch)])
            for task in done:
                if isinstance(task, _Decode):
                    self._after_decode(task)

    @property
    def _held(self) -> int:
        return len(self._fetching) + len(self._arrived) + len(self._decoding)

    def _next_ended(self) -> list[_Task]:
        """All that has ended, at least one unless the time to wait is over."""
        patience_s = max(0.0, self._look_up_at - time.monotonic()) if self._arrived else _LOOK_S
        done: list[_Task] = []
        with suppress(Empty):
            done.append(self._ended.get(timeout=patience_s))
            while True:
                done.append(self._ended.get_nowait())
        return done

    def _after_fetch(self, tasks: Sequence[_Fetch]) -> None:
        """Looks up what has arrived, once it is a group, or has waited enough, or nothing more is to come."""
        for task in tasks:
            self._fetching.remove(task)
            item = task.item
            if task.error is not None:
                item.error = _without_frames(task.error)
                continue
            content, fetched = task.content, task.content.fetched
            item.facts = ImageFacts(
                content.sha256, len(fetched.data), etag=fetched.etag, version_id=fetched.version_id
            )
            if content.sha256 in self._twins:
                self._twins[content.sha256].append(item)
                continue
            if not self._arrived:
                self._look_up_at = time.monotonic() + _LINGER_S
            self._arrived.append(task)
        enough = len(self._arrived) >= self._collector.group or not self._fetching
        if self._arrived and (enough or time.monotonic() >= self._look_up_at):
            self._look_up()

    def _look_up(self) -> None:
        arrived, self._arrived = self._arrived, []
        hashes = sorted({task.content.sha256 for task in arrived})
        known = unpack(self._collector.known(self._runtime.encoder_sha256, hashes))
        for task in arrived:
            self._reuse_or_decode(task.item, task.content, known)

    def _reuse_or_decode(self, item: Item, content: _Bytes, known: Mapping[str, NDArray[np.float32]]) -> None:
        if content.sha256 in self._twins:
            self._twins[content.sha256].append(item)
            return
        self._twins[content.sha256] = [item]
        if (embedding := known.get(content.sha256)) is not None:
            self._collector.reuse(item, content, embedding)
            if self._observer is not None and item.error is None:
                self._observer.saw_bytes(content.sha256, content.fetched.data)
        else:
            self._decoding.add(self._collector.decode(self._number, item, self._ended, content))

    def _after_decode(self, task: _Decode) -> None:
        self._decoding.remove(task)
        item, sha256 = task.item, task.content.sha256
        if task.error is not None:
            for twin in self._twins[sha256]:
                twin.error = _without_frames(task.error)
            return
        crop = task.crop
        if self._observer is not None:
            self._observer.saw_crop(sha256, crop)
        item.timings_ms["encode"] = time.perf_counter()
        try:
            self._encoding[item] = self._runtime.embedder.submit(crop, item.job.priority, self._number)
        except TransientError as unavailable:
            del item.timings_ms["encode"]
            for twin in self._twins[sha256]:
                twin.error, twin.encoding = unavailable, True

    def finish(self, item: Item) -> None:
        """Waits for the embedding of one item; its twins (same bytes in this batch) take it over."""
        self._take_embedding(item)
        if self._observer is not None and item.embedding is not None and item.facts is not None:
            self._observer.saw_embedding(item.facts.sha256, item.embedding)

    def _take_embedding(self, item: Item) -> None:
        if item.error is not None or item.embedding is not None:
            return
        first = self._twins[item.facts.sha256][0] if item.facts else item
        if first is not item:
            self._take_embedding(first)
            item.error, item.encoding = first.error, first.encoding
            item.embedding, item.facts = first.embedding, _facts_of_duplicate(item, first)
            item.timings_ms["reused"] = 1.0
            return
        encoded = self._encoding[item]
        while not encoded.done() and wait([encoded], timeout=_LOOK_S).not_done:
            if not encoded.running():
                self._progress()
        began = item.timings_ms.pop("encode")
        if (error := encoded.exception()) is not None:
            item.error, item.encoding = error, True
            return
        embedding = encoded.result()
        if not np.isfinite(embedding).all():
            item.error = ImageRejectedError(RejectReason.INTERNAL, "the encoder gave numbers that are not finite")
            return
        item.embedding = embedding
        item.timings_ms["encode"] = (time.perf_counter() - began) * 1000
        item.fresh = pack(embedding)


class _timed:  # noqa: N801 - reads as a verb where it is used
    """Adds the milliseconds that its block took to the item's timings."""

    def __init__(self, item: Item, stage: str) -> None:
        self._item, self._stage = item, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._item.timings_ms[self._stage] = round((time.perf_counter() - self._start) * 1000, 3)


def _without_frames(error: BaseException) -> BaseException:
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


def _with_source(facts: ImageFacts, fetched: Fetched) -> ImageFacts:
    return replace(facts, etag=fetched.etag, version_id=fetched.version_id)


def _facts_of_duplicate(item: Item, first: Item) -> ImageFacts | None:
    """The facts of an image whose bytes are another's: the same but for the source's own version."""
    own, facts = item.facts, first.facts
    if own is None or facts is None or (own.etag, own.version_id) == (facts.etag, facts.version_id):
        return facts
    return replace(facts, etag=own.etag, version_id=own.version_id)
