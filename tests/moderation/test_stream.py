"""Streams of images through the pipeline: bounded, and in order no matter which one ends first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from code_worker.errors import ImageRejectedError
from code_worker.moderation.pipeline import Collector
from code_worker.moderation.pool import PriorityPool
from code_worker.settings import LimitSettings
from code_worker.types import Job
from tests.moderation.doubles import DictSources, MeanEmbedder, png

IMAGES = {str(number): png(number) for number in range(40)}


class LastFirst(MeanEmbedder):
    """Embeds what waits on a thread of its own, the last one first."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: SimpleQueue[tuple[Future[NDArray[np.float32]], NDArray[np.float32]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, crop: NDArray[np.uint8], priority: int = 4, turn: int = 0) -> Future[NDArray[np.float32]]:
        future: Future[NDArray[np.float32]] = Future()
        self._begun.put((future, super().submit(crop, priority, turn).result()))
        return future

    def close(self) -> None:
        self._begun.put(None)
        self._thread.join()

    def _work(self) -> None:
        some: list[tuple[Future[NDArray[np.float32]], NDArray[np.float32]]] = []
        while True:
            try:
                if (more := self._begun.get(timeout=0.002)) is None:
                    return
                some.append(more)
            except Empty:
                while some:
                    future, value = some.pop()
                    future.set_result(value)


def encoder(embedder: MeanEmbedder) -> Any:
    return SimpleNamespace(encoder_sha256="e" * 64, embedder=embedder)


@pytest.mark.parametrize("at_most", [1, 4, 10, 40, None])
def test_items_come_in_the_order_of_the_jobs_however_many_may_be_begun(at_most: int | None) -> None:
    begun: list[str] = []
    taken = 0
    most = 0

    def jobs() -> Iterator[Job]:
        nonlocal most
        for uri in [*IMAGES, "3"]:
            begun.append(uri)
            most = max(most, len(begun) - taken)
            yield Job(id=uri, uri=uri)

    with PriorityPool(3) as pool, closing(LastFirst()) as embedder:
        collector = Collector(DictSources(IMAGES), pool, LimitSettings(), None)
        found = []
        for item in collector.embeddings(jobs(), encoder(embedder), at_most=at_most):
            taken += 1
            assert item.embedding is not None
            found.append(round(255 * float(item.embedding[0])))
    assert found == [*range(40), 3]
    assert embedder.crops == 40, "the same bytes are encoded once, however far apart they come"
    assert most <= (at_most or 41) + 1


def test_what_cannot_be_decoded_is_told_for_every_image_with_these_bytes() -> None:
    uris = ["a", "1", "b", "2", "c"]
    objects = {**IMAGES, **dict.fromkeys("abc", b"no image at all, and long enough")}
    with PriorityPool(1) as pool:
        collector = Collector(DictSources(objects), pool, LimitSettings(), None)
        jobs = (Job(id=uri, uri=uri) for uri in uris)
        items = list(collector.embeddings(jobs, encoder(MeanEmbedder()), at_most=1))
    assert [item.job.uri for item in items if isinstance(item.error, ImageRejectedError)] == ["a", "b", "c"]


def test_only_so_many_files_are_in_memory() -> None:
    """Those that are fetched and wait for the decoder count as well as those that are being fetched."""
    gate, lock = threading.Event(), threading.Lock()
    fetched = 0

    class Counted(DictSources):
        def fetch(self, uri: str) -> Any:
            nonlocal fetched
            with lock:
                fetched += 1
                if fetched == 4:
                    gate.set()
            return super().fetch(uri)

    def decode(_: bytes) -> tuple[NDArray[np.uint8], None]:
        assert gate.wait(60)
        with lock:
            assert fetched - embedder.crops <= 4
        return np.zeros((224, 224, 3), np.uint8), None

    embedder = MeanEmbedder()
    with PriorityPool(2) as pool:
        collector = Collector(Counted(IMAGES), pool, LimitSettings(), None, decode)
        jobs = (Job(id=uri, uri=uri) for uri in IMAGES)
        items = list(collector.embeddings(jobs, encoder(embedder), at_most=100))
    assert [item.error for item in items] == [None] * 40
