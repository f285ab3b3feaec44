"""The process's one encoder loop: crops of all callers join into micro-batches, the urgent ones first."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from code_worker.encoder.torch_engine import CROP_SHAPE, CUDA_BATCH
from code_worker.errors import ImageRejectedError, TransientError
from code_worker.logs import get_logger
from code_worker.system.machine import usable_cores
from code_worker.types import EMBEDDING_DIM, RejectReason

CUDA_STREAMS = 2

Crop = NDArray[np.uint8]
Embedding = NDArray[np.float32]
log = get_logger(__name__)

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class BatchEncoder(Protocol):
    """An engine that the loop drives: it embeds a batch and names its device."""

    device: str

    def embed(self, crops: Crop) -> Embedding:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`."""


@dataclass(frozen=True, slots=True)
class LoopStats:
    """Counts of a loop since it was built; `busy_s` is summed over its streams."""

    crops: int
    batches: int
    failed: int
    waiting: int
    busy_s: float


@dataclass(order=True, slots=True)
class _Item:
    """A waiting crop; items order by urgency, then by turn, then by arrival."""

    rank: tuple[int, int, int]
    crop: Crop = field(compare=False)
    future: Future[Embedding] = field(compare=False)

    @property
    def priority(self) -> int:
        return -self.rank[0]


class EncoderLoop:
    """Streams (threads) that take waiting crops, most urgent first, and embed them in micro-batches.

    On a CPU the fastest form is one stream per core with one torch thread each and micro-batches of 8; on CUDA two
    streams with larger batches, of which one fills and copies while the other computes. A batch that fails is halved
    until the crops that fail alone are found: they get their own error, all others their embedding. A device that has
    failed for good ends the loop: `failure` says why, every crop gets a `TransientError`, and the process should be
    replaced.
    """

    def __init__(
        self,
        engine: BatchEncoder,
        *,
        streams: int | None = None,
        micro_batch: int | None = None,
        linger_ms: float = 4.0,
        max_waiting: int | None = None,
    ) -> None:
        """Starts the streams.

        Args:
            engine: what embeds.
            streams: threads; by default one per usable core on a CPU, two on CUDA.
            micro_batch: most crops per forward pass; by default 8 on a CPU, 256 on CUDA.
            linger_ms: how long a stream waits for its micro-batch to fill; it never waits while one is full.
            max_waiting: `submit` blocks while so many crops of the same or a higher priority wait; by default 512, or
                enough for every stream to find two micro-batches.
        """
        on_cpu = engine.device == "cpu"
        cores = usable_cores()
        self.streams = streams or (cores if on_cpu else CUDA_STREAMS)
        self.micro_batch = micro_batch or (8 if on_cpu else CUDA_BATCH)
        self.engine = getattr(engine, "name", type(engine).__name__)
        self.failure: BaseException | None = None
        self._engine = engine
        self._linger_s = linger_ms / 1000
        self._max_waiting = max_waiting or max(512, 2 * self.streams * self.micro_batch)
        self._torch_threads = max(1, cores // self.streams) if on_cpu else None
        # `_heap`, `_waiting`, the counters and `failure` are guarded by the one lock of both conditions. Nothing is
        # embedded and no future settled under it: callbacks of a future run in the thread that settles it.
        self._heap: list[_Item] = []
        self._waiting: Counter[int] = Counter()
        self._arrivals = itertools.count()
        self._closed = False
        self._crops = self._batches = self._failed = self._running = 0
        self._busy_s = 0.0
        # One lock, two conditions: streams wait for crops on `_filled`, callers for room on `_drained`.
        lock = threading.RLock()
        self._filled = threading.Condition(lock)
        self._drained = threading.Condition(lock)
        self._threads = self._start_streams()

    def _start_streams(self) -> list[threading.Thread]:
        threads = [
            threading.Thread(target=self._stream, name=f"encoder-{number}", daemon=True)
            for number in range(self.streams)
        ]
        for thread in threads:
            thread.start()
        return threads

    def submit(self, crop: Crop, priority: int = 4, turn: int = 0) -> Future[Embedding]:
        """Queues one `(224, 224, 3) uint8` crop; the future yields its `(192,) float32` embedding.

        Higher priorities first, within one the lower `turn` (the number of a caller's batch), then order of arrival.
        Blocks while too many crops that are as urgent wait; less urgent ones never hold it up. Cancelling the
        future takes the crop out, unless it is being embedded already.

        Raises:
            ValueError: another shape or type.
            TransientError: the loop is closed or its device has failed.
        """
        if crop.dtype != np.uint8 or crop.shape != CROP_SHAPE:
            raise ValueError(f"a crop must be (224, 224, 3) uint8, not {crop.shape} {crop.dtype}")
        future: Future[Embedding] = Future()
        with self._drained:
            # Only crops that are as urgent count: a backlog of less urgent ones must not hold up a live image.
            self._drained.wait_for(lambda: self._ended or self._ahead_of(priority) < self._max_waiting)
            if self._ended:
                raise self._unavailable()
            heapq.heappush(self._heap, _Item((-priority, turn, next(self._arrivals)), crop, future))
            self._waiting[priority] += 1
            # A stream looks when the first crop is there and when a batch is full; between the two it lingers.
            if len(self._heap) == 1 or len(self._heap) >= self.micro_batch:
                self._filled.notify_all()
        return future

    def embed(self, crops: Sequence[Crop] | Crop, priority: int = 4) -> Embedding:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`, through the queue.

        Raises:
            Exception: the error of the first crop that failed; crops still waiting are taken out.
        """
        futures: list[Future[Embedding]] = []
        try:
            for crop in crops:
                futures.append(self.submit(crop, priority))  # noqa: PERF401 - those queued before an error are cancelled
            rows = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        return np.stack(rows) if rows else np.empty((0, EMBEDDING_DIM), np.float32)

    @property
    def busy(self) -> bool:
        """True if crops wait or are being embedded at this moment."""
        with self._filled:
            return self.failure is None and (bool(self._heap) or self._running > 0)

    def stats(self) -> LoopStats:
        """Counters at this moment."""
        with self._filled:
            return LoopStats(self._crops, self._batches, self._failed, len(self._heap), self._busy_s)

    def close(self) -> None:
        """Finishes what is queued, then ends the streams; afterwards `submit` raises. Closing twice is harmless."""
        with self._filled:
            self._closed = True
            self._filled.notify_all()
            self._drained.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _ended(self) -> bool:
        return self._closed or self.failure is not None

    def _ahead_of(self, priority: int) -> int:
        return sum(count for level, count in self._waiting.items() if level >= priority)

    def _unavailable(self) -> TransientError:
        what = "the encoder loop is closed" if self.failure is None else f"the device failed: {self.failure}"
        return TransientError(RejectReason.MODEL_UNAVAILABLE, what)

    def _stream(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        batch: list[_Item] = []
        try:
            while batch := self._next_batch():
                started = time.perf_counter()
                self._encode(batch)
                with self._filled:
                    self._running -= 1
                    self._batches += 1
                    self._busy_s += time.perf_counter() - started
        except torch.AcceleratorError as error:
            self._fail(error, batch)
        except BaseException as error:
            self._fail(error, batch)
            raise

    def _next_batch(self) -> list[_Item]:
        """The most urgent crops, at least one; none when the loop has ended and nothing is left."""
        while True:
            with self._filled:
                self._filled.wait_for(lambda: self._heap or self._ended)
                if not self._heap:
                    return []
                # What arrives meanwhile may be more urgent, so nothing is taken before the wait is over.
                self._filled.wait_for(lambda: len(self._heap) >= self.micro_batch or self._ended, self._linger_s)
                taken = [heapq.heappop(self._heap) for _ in range(min(self.micro_batch, len(self._heap)))]
                self._waiting.subtract(item.priority for item in taken)
                self._running += 1
                self._drained.notify_all()
            # From here on a future cannot be cancelled; those that were are dropped unembedded.
            if batch := [item for item in taken if item.future.set_running_or_notify_cancel()]:
                return batch
            with self._filled:
                self._running -= 1

    def _encode(self, batch: list[_Item]) -> None:
        """Settles the future of every item, halving the batch as long as it fails as a whole."""
        result = self._attempt(batch)
        if not isinstance(result, Exception):
            self._settle(batch, result)
        elif len(batch) == 1:
            self._settle_failed(batch[0], result)
        else:
            # One bad crop among n costs at most 2·log₂(n) passes more.
            middle = len(batch) // 2
            self._encode(batch[:middle])
            self._encode(batch[middle:])

    def _attempt(self, batch: list[_Item]) -> Embedding | Exception:
        try:
            return self._engine.embed(np.stack([item.crop for item in batch]))
        except torch.AcceleratorError:
            raise  # the device is lost for every crop, not for one of these
        except Exception as error:  # noqa: BLE001 - outermost frame of the stream: the error belongs to some crop
            # The frames hold tensors of the failed pass, and the halves may need that memory.
            traceback.clear_frames(error.__traceback__)
            return error

    def _settle(self, batch: list[_Item], rows: Embedding) -> None:
        for item, row in zip(batch, rows, strict=True):
            if np.isfinite(row).all():
                self._count(crops=1)
                item.future.set_result(row)
            else:
                detail = "the encoder gave numbers that are not finite"
                self._settle_failed(item, ImageRejectedError(RejectReason.INTERNAL, detail))

    def _settle_failed(self, item: _Item, error: Exception) -> None:
        self._count(failed=1)
        if isinstance(error, _OUT_OF_MEMORY):
            error = TransientError(RejectReason.MODEL_UNAVAILABLE, f"out of memory for a single crop: {error}")
        item.future.set_exception(error)

    def _count(self, *, crops: int = 0, failed: int = 0) -> None:
        with self._filled:
            self._crops += crops
            self._failed += failed

    def _fail(self, error: BaseException, batch: list[_Item]) -> None:
        """Ends the loop: the device answers nothing any more, so nobody may be left waiting for it."""
        log.error("encoder_failed", error=str(error), kind=type(error).__name__)
        with self._filled:
            # Under the lock, so that no crop is queued between the last look at the heap and the end.
            self.failure = self.failure or error
            waiting, self._heap = self._heap, []
            self._waiting.clear()
            self._filled.notify_all()
            self._drained.notify_all()
        running = [item for item in batch if not item.future.done()]
        for item in running + [item for item in waiting if item.future.set_running_or_notify_cancel()]:
            item.future.set_exception(self._unavailable())
