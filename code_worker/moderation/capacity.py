"""Measures what this machine can judge: decoding, the forward pass, and both, in alternating rounds."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from code_worker.images.decode import decode
from code_worker.moderation.scan import scan

if TYPE_CHECKING:
    from code_worker.encoder.loop import EncoderLoop
    from code_worker.moderation.judge import Judge
    from code_worker.moderation.policy import PolicyBook
    from code_worker.moderation.runtime import Runtime
    from code_worker.settings import LimitSettings

ROUNDS: Final = 3
_DAY_S: Final = 86_400
_HEADROOM: Final = 0.7
"""Share of its measured rate that a worker should be planned with: peaks, retries and neighbours take the rest."""
_UNDER_WAY: Final = 256
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rate:
    """Images per second, one figure per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.rounds)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The measured figures.

    Attributes:
        decode_one: decoding in one thread, from memory.
        decode_all: decoding in as many threads as a worker has.
        forward: the encoder's loop on ready crops.
        end_to_end: from files to verdicts.
        engine: what runs the encoder, `torch` or `openvino`.
        busy: share of that time in which the encoder's streams were at work, 0 to 1, by round.
    """

    decode_one: Rate
    decode_all: Rate
    forward: Rate
    end_to_end: Rate
    engine: str
    busy: tuple[float, ...]

    @property
    def limit(self) -> str:
        """`encoder` or `decoding`: the one of the two that alone would take longer."""
        return "encoder" if self.forward.median <= self.decode_all.median else "decoding"


def workers_for(images_per_day: int, images_per_s: float) -> int:
    """Worker processes on machines like this one for so many images a day, evenly spread, with headroom."""
    return math.ceil(images_per_day / _DAY_S / (images_per_s * _HEADROOM))


class Bench:
    """Measures on images of one's own or made ones; each stage runs for the same time in every round.

    Args:
        runtime: a release at work, its loop started.
        judge: fetches and decodes as a worker does.
        policies: of the release.
        files: local files and their bytes, a few dozen different ones: what is twice in a batch is encoded once.
        limits: what an image may cost.
        threads: of a worker's pool.
    """

    def __init__(
        self,
        runtime: Runtime,
        judge: Judge,
        policies: PolicyBook,
        *,
        files: Sequence[tuple[str, bytes]],
        limits: LimitSettings,
        threads: int,
    ) -> None:
        self._runtime, self._judge, self._policies = runtime, judge, policies
        self._loop = cast("EncoderLoop", runtime.embedder)
        self._uris, self._data = [uri for uri, _ in files], [data for _, data in files]
        self._limits, self._threads = limits, threads
        self._crops = [decode(data, limits)[0] for data in self._data]

    def run(self, seconds: float, say: Callable[[int], None] = lambda _: None) -> Capacity:
        """Each stage for so long in each of `ROUNDS` rounds; calls `say` after each."""
        stages = (self._decode_one, self._decode_all, self._forward, self._end_to_end)
        rates: dict[int, list[float]] = {number: [] for number in range(len(stages))}
        busy: list[float] = []
        for turn in range(ROUNDS):
            # Every other round goes backwards, so that a machine that slows down slows all stages alike.
            order = range(len(stages)) if turn % 2 == 0 else reversed(range(len(stages)))
            for number in order:
                before, began = self._loop.stats().busy_s, time.perf_counter()
                images = stages[number](began + seconds)
                took = time.perf_counter() - began
                rates[number].append(images / took)
                if stages[number] == self._end_to_end:
                    # Streams work side by side: so many seconds of work fit into one.
                    busy.append(min(1.0, (self._loop.stats().busy_s - before) / took / self._loop.streams))
                say(1)
        one, every, forward, whole = (Rate(tuple(values)) for values in rates.values())
        return Capacity(one, every, forward, whole, self._loop.engine, tuple(busy))

    def _decode_one(self, until: float) -> int:
        return sum(1 for data in _cycle(self._data, until) if len(decode(data, self._limits)[0]))

    def _decode_all(self, until: float) -> int:
        with ThreadPoolExecutor(self._threads) as pool:
            return sum(pool.map(lambda _: self._decode_one(until), range(self._threads)))

    def _forward(self, until: float) -> int:
        under_way = deque[Future[NDArray[np.float32]]]()
        done = 0
        for crop in _cycle(self._crops, until):
            under_way.append(self._loop.submit(crop))
            # Enough that the loop never waits for crops, and bounded.
            if len(under_way) > _UNDER_WAY:
                under_way.popleft().result()
                done += 1
        for future in under_way:
            future.result()
        return done + len(under_way)

    def _end_to_end(self, until: float) -> int:
        return sum(1 for _ in scan(_cycle(self._uris, until), self._judge, self._runtime, self._policies))


def _cycle(items: Sequence[T], until: float) -> Iterator[T]:
    """The items over and over, until the clock (`time.perf_counter`) says so."""
    for item in itertools.cycle(items):
        if time.perf_counter() >= until:
            return
        yield item
