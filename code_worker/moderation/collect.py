"""From jobs to embeddings: fetch, hash, reuse, decode and encode, overlapping and bounded."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from code_worker.errors import ImageRejectedError, TransientError
from code_worker.images.decode import decode, inspect
from code_worker.types import EMBEDDING_DIM, ImageFacts, Job, RejectReason

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.images.source import Fetched
    from code_worker.moderation.judge import Fetcher, KnownEmbeddings
    from code_worker.moderation.pool import PriorityPool
    from code_worker.moderation.runtime import Runtime
    from code_worker.settings import LimitSettings

__all__ = ["STORED", "Collector", "Item", "Witness"]

_LOOK_S = 5.0
_LINGER_S = 0.01
"""How long an image that has arrived waits for others to be looked up with: a query for each would cost more."""
STORED = np.dtype("<f4")
"""Of an embedding as the store keeps it."""


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


class Witness(Protocol):
    """Who looks on: called from the batch's own thread, so it must neither wait nor raise."""

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
        self, jobs: Sequence[Job], runtime: Runtime, progress: Callable[[], None], witness: Witness | None = None
    ) -> Iterator[Item]:
        """One item per job, in the jobs' order, each with an embedding or an error; calls `progress` on the way."""
        batch = _Batch(self, runtime, progress, witness)
        items = [Item(job) for job in jobs]
        batch.run(items)
        for item in items:
            batch.finish(item)
            progress()
            yield item

    def fetch(self, item: Item) -> _Bytes:
        """Gets and hashes the bytes; runs in the pool."""
        with _timed(item, "fetch"):
            fetched = self._sources.fetch(item.job.uri)
            return _Bytes(fetched, hashlib.sha256(fetched.data).hexdigest())

    def decode(self, item: Item, content: _Bytes) -> NDArray[np.uint8]:
        """Turns bytes into the crop; runs in the pool."""
        with _timed(item, "decode"):
            crop, facts = decode(content.fetched.data, self._limits, sha256=content.sha256)
        item.facts = _with_source(facts, content.fetched)
        return crop

    def reuse(self, item: Item, content: _Bytes, embedding: NDArray[np.float32]) -> None:
        """Takes over an embedding; the header is read all the same, for the facts and for limits set since."""
        try:
            facts = inspect(content.fetched.data, self._limits, sha256=content.sha256)
            item.facts = _with_source(facts, content.fetched)
        except ImageRejectedError as error:
            item.error = error
            return
        item.embedding = embedding
        item.timings_ms["reused"] = 1.0

    def known(self, encoder_sha256: str, hashes: Sequence[str]) -> Mapping[str, bytes]:
        """Embeddings of these contents that an earlier job left."""
        return {} if self._known is None else self._known(encoder_sha256, hashes)

    @property
    def group(self) -> int:
        """How many images to look up at once, where there is anything to look up."""
        return 1 if self._known is None else self._pool.size

    def submit(self, batch: int, item: Item, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queues work for one job: urgent ones first, then older batches, so that batches end one after the other.

        Were batches served in turn, they would all end late together, and a live job would wait for a free slot.
        """
        return self._pool.submit((-item.job.priority, batch), work, item, *arguments)

    @property
    def window(self) -> int:
        """How many objects of one batch may be on their way, so that memory does not grow with the batch."""
        return 2 * self._pool.size


class _Batch:
    """The state of one call: which futures belong to which item, and what was seen twice."""

    def __init__(
        self, collector: Collector, runtime: Runtime, progress: Callable[[], None], witness: Witness | None
    ) -> None:
        self._collector = collector
        self._runtime = runtime
        self._progress = progress
        self._witness = witness
        self._number = next(collector.numbers)
        self._fetching: dict[Future[_Bytes], Item] = {}
        self._arrived: list[tuple[Item, _Bytes]] = []
        self._look_up_at = 0.0
        self._decoding: dict[Future[NDArray[np.uint8]], tuple[Item, str]] = {}
        self._encoding: dict[Item, Future[NDArray[np.float32]]] = {}
        self._twins: dict[str, list[Item]] = {}

    def run(self, items: Sequence[Item]) -> None:
        waiting = deque(items)
        while waiting or self._fetching or self._decoding:
            while waiting and self._held < self._collector.window:
                item = waiting.popleft()
                self._fetching[self._collector.submit(self._number, item, self._collector.fetch)] = item
            pending: list[Future[Any]] = [*self._fetching, *self._decoding]
            done, _ = wait(pending, timeout=self._patience_s(), return_when=FIRST_COMPLETED)
            # Waiting for one's turn behind more urgent images is not being stuck.
            if done or not any(future.running() for future in pending):
                self._progress()
            self._after_fetch([future for future in done if future in self._fetching])
            for future in done:
                if future in self._decoding:
                    self._after_decode(future)

    @property
    def _held(self) -> int:
        return len(self._fetching) + len(self._arrived) + len(self._decoding)

    def _patience_s(self) -> float:
        return max(0.0, self._look_up_at - time.monotonic()) if self._arrived else _LOOK_S

    def _after_fetch(self, futures: Sequence[Future[_Bytes]]) -> None:
        """Looks up what has arrived, once it is a group, or has waited enough, or nothing more is to come."""
        for future in futures:
            item = self._fetching.pop(future)
            if (error := future.exception()) is not None:
                item.error = error
                continue
            content = future.result()
            fetched = content.fetched
            item.facts = ImageFacts(
                content.sha256, len(fetched.data), etag=fetched.etag, version_id=fetched.version_id
            )
            if not self._arrived:
                self._look_up_at = time.monotonic() + _LINGER_S
            self._arrived.append((item, content))
        enough = len(self._arrived) >= self._collector.group or not self._fetching
        if self._arrived and (enough or time.monotonic() >= self._look_up_at):
            self._look_up()

    def _look_up(self) -> None:
        arrived, self._arrived = self._arrived, []
        known = self._collector.known(
            self._runtime.encoder_sha256, sorted({content.sha256 for _, content in arrived})
        )
        for item, content in arrived:
            self._reuse_or_decode(item, content, known)

    def _reuse_or_decode(self, item: Item, content: _Bytes, known: Mapping[str, bytes]) -> None:
        if (stored := known.get(content.sha256)) is not None and len(stored) == EMBEDDING_DIM * STORED.itemsize:
            self._collector.reuse(item, content, np.frombuffer(stored, dtype=STORED).astype(np.float32))
            if self._witness is not None and item.error is None:
                self._witness.saw_bytes(content.sha256, content.fetched.data)
        elif content.sha256 in self._twins:
            self._twins[content.sha256].append(item)
        else:
            self._twins[content.sha256] = [item]
            future = self._collector.submit(self._number, item, self._collector.decode, content)
            self._decoding[future] = (item, content.sha256)

    def _after_decode(self, future: Future[NDArray[np.uint8]]) -> None:
        item, sha256 = self._decoding.pop(future)
        if (error := future.exception()) is not None:
            for twin in self._twins[sha256]:
                twin.error = error
            return
        crop = future.result()
        if self._witness is not None:
            self._witness.saw_crop(sha256, crop)
        item.timings_ms["encode"] = -time.perf_counter()
        try:
            self._encoding[item] = self._runtime.embedder.submit(crop, item.job.priority, self._number)
        except TransientError as unavailable:
            for twin in self._twins[sha256]:
                twin.error, twin.encoding = unavailable, True

    def finish(self, item: Item) -> None:
        """Waits for the embedding of one item; its twins (same bytes in this batch) take it over."""
        self._take_embedding(item)
        if self._witness is not None and item.embedding is not None and item.facts is not None:
            self._witness.saw_embedding(item.facts.sha256, item.embedding)

    def _take_embedding(self, item: Item) -> None:
        if item.error is not None or item.embedding is not None:
            return
        first = self._twins[item.facts.sha256][0] if item.facts else item
        if first.error is not None:
            item.error, item.encoding = first.error, first.encoding
            return
        encoded = self._encoding[first]
        while not encoded.done() and wait([encoded], timeout=_LOOK_S).not_done:
            if not encoded.running():
                self._progress()
        if (error := encoded.exception()) is not None:
            item.error, item.encoding = error, True
            return
        embedding = encoded.result()
        if not np.isfinite(embedding).all():
            item.error = ImageRejectedError(RejectReason.INTERNAL, "the encoder gave numbers that are not finite")
            return
        item.embedding = embedding
        if item is first:
            item.timings_ms["encode"] += time.perf_counter()
            item.timings_ms["encode"] *= 1000
            item.fresh = embedding.astype(STORED).tobytes()
        elif item.facts is not None and first.facts is not None:
            item.facts = replace(first.facts, etag=item.facts.etag, version_id=item.facts.version_id)


class _timed:  # noqa: N801 - reads as a verb where it is used
    """Adds the milliseconds that its block took to the item's timings."""

    def __init__(self, item: Item, stage: str) -> None:
        self._item, self._stage = item, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._item.timings_ms[self._stage] = round((time.perf_counter() - self._start) * 1000, 3)


def _with_source(facts: ImageFacts, fetched: Fetched) -> ImageFacts:
    return replace(facts, etag=fetched.etag, version_id=fetched.version_id)
