"""From jobs to embeddings: fetch, hash, reuse, decode and encode, overlapping and bounded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from code_worker.errors import ImageRejectedError, TransientError
from code_worker.images.decode import decode, inspect
from code_worker.moderation.image_tasks import (
    Content,
    Decode,
    DecodeBytes,
    Fetch,
    Item,
    Task,
    with_source,
    without_frames,
)
from code_worker.moderation.vectors import pack, unpack
from code_worker.types import ImageFacts, Job, RejectReason

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.moderation.pool import PriorityPool
    from code_worker.moderation.runtime import Embedder, Fetcher, KnownEmbeddings
    from code_worker.settings import LimitSettings

_LOOK_S = 5.0
_LINGER_S = 0.01
"""How long an image that has arrived waits for others to be looked up with: a query for each would cost more."""
_SomeTask = TypeVar("_SomeTask", bound="Task")


class Encoder(Protocol):
    """An encoder and its weights' hash: a release's runtime, or an encoder that is being trained."""

    @property
    def encoder_sha256(self) -> str:
        """Its weights' hash, by which stored embeddings are found."""

    @property
    def embedder(self) -> Embedder:
        """The loop that crops are handed to."""


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
        self,
        sources: Fetcher,
        pool: PriorityPool,
        limits: LimitSettings,
        known: KnownEmbeddings | None,
        decode_bytes: DecodeBytes | None = None,
    ) -> None:
        self._sources = sources
        self._decode_bytes = decode_bytes
        self._pool = pool
        self._limits = limits
        self._known = known
        self.numbers = count()

    def embeddings(
        self,
        jobs: Iterable[Job],
        encoder: Encoder,
        progress: Callable[[], None] = lambda: None,
        observer: Observer | None = None,
        *,
        at_most: int | None = None,
    ) -> Iterator[Item]:
        """One item per job, in the jobs' order, each with an embedding or an error.

        Args:
            jobs: read by the calling thread as the work proceeds.
            encoder: embeds what is not known.
            progress: called on the way, so that a watchdog can tell slow from stuck.
            observer: is shown what the images turn into.
            at_most: jobs that are begun and not given out, for long streams. Unset: all are fetched and decoded
                before the first is given out, so that nothing that the caller does with one holds up the others.
        """
        # One batch per call and thread: batches share the pool and the encoder, and no state.
        batch = _Batch(self, encoder, progress, observer)
        for item in batch.run(map(Item, jobs), at_most):
            batch.finish(item)
            progress()
            yield item

    def fetch(self, batch: int, item: Item, ended: SimpleQueue[Task]) -> Fetch:
        """Has the bytes of an image fetched."""
        return self._submit(batch, Fetch(item, ended, self._sources))

    def decode(self, batch: int, item: Item, ended: SimpleQueue[Task], content: Content) -> Decode:
        """Has bytes turned into the crop."""
        decode_bytes = self._decode_bytes or partial(decode, limits=self._limits, sha256=content.sha256)
        return self._submit(batch, Decode(item, ended, content, decode_bytes))

    def reuse(self, item: Item, content: Content, embedding: NDArray[np.float32]) -> None:
        """Takes over an embedding; the header is read all the same, for the facts and for limits set since."""
        try:
            facts = inspect(content.fetched.data, self._limits, sha256=content.sha256)
            item.facts = with_source(facts, content.fetched)
        except ImageRejectedError as error:
            item.error = without_frames(error)
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
        self, collector: Collector, encoder: Encoder, progress: Callable[[], None], observer: Observer | None
    ) -> None:
        self._collector = collector
        self._encoder = encoder
        self._progress = progress
        self._observer = observer
        self._number = next(collector.numbers)
        # Tasks run on threads of the pool and say here that they ended; all else is of the thread that called alone.
        self._ended: SimpleQueue[Task] = SimpleQueue()
        self._fetching: set[Fetch] = set()
        self._arrived: list[Fetch] = []
        self._look_up_at = 0.0
        self._decoding: set[Decode] = set()
        self._encoding: dict[Item, Future[NDArray[np.float32]]] = {}
        # By content hash: the first item is decoded and encoded, the others take its embedding over.
        self._twins: dict[str, list[Item]] = {}

    def run(self, items: Iterator[Item], at_most: int | None) -> Iterator[Item]:
        """Fetches and decodes; gives out the items in their order, to be finished."""
        # In the order of the jobs; what ends early waits here for those before it.
        begun: deque[Item] = deque()
        more = True
        while more or self._held:
            # Bytes and crops of at most `window` objects are in memory, however long the batch is.
            while more and self._held < self._collector.window and (at_most is None or len(begun) < at_most):
                if (item := next(items, None)) is None:
                    more = False
                else:
                    self._fetching.add(self._collector.fetch(self._number, item, self._ended))
                    begun.append(item)
            if self._held:
                self._advance()
            while at_most is not None and begun and (self._is_done(begun[0]) or self._is_full(begun, at_most)):
                yield begun.popleft()
        yield from begun

    def _advance(self) -> None:
        """Waits until some task has ended, and begins what follows it."""
        done = self._next_ended()
        # Waiting for one's turn behind more urgent images is not being stuck.
        if done or not any(task.running for task in (*self._fetching, *self._decoding)):
            self._progress()
        self._after_fetch([task for task in done if isinstance(task, Fetch)])
        for task in done:
            if isinstance(task, Decode):
                self._after_decode(task)

    def _is_full(self, begun: Sized, at_most: int) -> bool:
        """Returns whether no more may be begun, and all that was is being encoded: the first is then waited for."""
        return not self._held and len(begun) >= at_most

    def _is_done(self, item: Item) -> bool:
        first = self._first_of(item)
        encoded = self._encoding.get(first)
        return first.error is not None or first.embedding is not None or (encoded is not None and encoded.done())

    def _first_of(self, item: Item) -> Item:
        """The item with the same bytes that is decoded and encoded for all of them."""
        return item if item.facts is None else self._twins.get(item.facts.sha256, [item])[0]

    @property
    def _held(self) -> int:
        return len(self._fetching) + len(self._arrived) + len(self._decoding)

    def _next_ended(self) -> list[Task]:
        """All that has ended, at least one unless the time to wait is over."""
        patience_s = max(0.0, self._look_up_at - time.monotonic()) if self._arrived else _LOOK_S
        done: list[Task] = []
        with suppress(Empty):
            # Woken by the first that ends, then all that ended by now: one turn of the loop for many.
            done.append(self._ended.get(timeout=patience_s))
            while True:
                done.append(self._ended.get_nowait())
        return done

    def _after_fetch(self, tasks: Sequence[Fetch]) -> None:
        """Looks up what has arrived, once it is a group, or has waited enough, or nothing more is to come."""
        for task in tasks:
            self._fetching.remove(task)
            item = task.item
            if task.error is not None:
                item.error = without_frames(task.error)
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
        # Sorted: the same images ask with the same list, whose statement the database has prepared.
        hashes = sorted({task.content.sha256 for task in arrived})
        known = unpack(self._collector.known(self._encoder.encoder_sha256, hashes))
        for task in arrived:
            self._reuse_or_decode(task.item, task.content, known)

    def _reuse_or_decode(self, item: Item, content: Content, known: Mapping[str, NDArray[np.float32]]) -> None:
        if content.sha256 in self._twins:
            self._twins[content.sha256].append(item)
            return
        self._twins[content.sha256] = [item]
        if (embedding := known.get(content.sha256)) is not None:
            self._collector.reuse(item, content, embedding)
            if self._observer is not None and item.error is None:
                self._observer.saw_bytes(content.sha256, content.fetched.data)
        else:
            # Known by nobody: from here on its bytes are held until the crop is made.
            self._decoding.add(self._collector.decode(self._number, item, self._ended, content))

    def _after_decode(self, task: Decode) -> None:
        self._decoding.remove(task)
        item, sha256 = task.item, task.content.sha256
        if task.error is not None:
            for twin in self._twins[sha256]:
                twin.error = without_frames(task.error)
            return
        crop = task.crop
        if self._observer is not None:
            self._observer.saw_crop(sha256, crop)
        item.timings_ms["encode"] = time.perf_counter()
        try:
            self._encoding[item] = self._encoder.embedder.submit(crop, item.job.priority, self._number)
        # The loop refuses: it failed for good, or its queue is closed. The images are not to blame.
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
        first = self._first_of(item)
        if first is not item:
            self._take_embedding(first)
            item.error, item.encoding = first.error, first.encoding
            item.embedding, item.facts = first.embedding, _facts_of_duplicate(item, first)
            item.timings_ms["reused"] = 1.0
            return
        # Popped, since the future holds the crop's result as long as it is held.
        encoded = self._encoding.pop(item)
        while not encoded.done() and wait([encoded], timeout=_LOOK_S).not_done:
            if not encoded.running():
                self._progress()
        began = item.timings_ms.pop("encode")
        if (error := encoded.exception()) is not None:
            item.error, item.encoding = error, True
            return
        # (192,) float32
        embedding = encoded.result()
        if not np.isfinite(embedding).all():
            item.error = ImageRejectedError(RejectReason.INTERNAL, "the encoder gave numbers that are not finite")
            return
        item.embedding = embedding
        item.timings_ms["encode"] = (time.perf_counter() - began) * 1000
        item.fresh = pack(embedding)


def _facts_of_duplicate(item: Item, first: Item) -> ImageFacts | None:
    """The facts of an image whose bytes are another's: the same but for the source's own version."""
    own, facts = item.facts, first.facts
    if own is None or facts is None or (own.etag, own.version_id) == (facts.etag, facts.version_id):
        return facts
    return replace(facts, etag=own.etag, version_id=own.version_id)
