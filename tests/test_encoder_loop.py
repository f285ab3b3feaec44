"""The encoder loop: order, isolation, back-pressure, ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from code_worker.encoder.loop import EncoderLoop
from code_worker.encoder.published import load_checkpoint
from code_worker.encoder.torch_engine import Engine
from code_worker.errors import ImageRejectedError, TransientError
from code_worker.types import EMBEDDING_TOLERANCE, RejectReason
from tests.parity import ParitySet
from tests.patience import polls

POISON, BLANK = 255, 254


def crop(value: int) -> NDArray[np.uint8]:
    """A crop that says which one it is; 254 and 255 are bad ones."""
    return np.broadcast_to(np.uint8(value), (224, 224, 3))


class Recorder:
    """A batch encoder that embeds a crop as its own value, and can be held, or fail as a device does."""

    def __init__(self, fails: Callable[[list[int]], Exception | None] = lambda _: None, device: str = "cpu") -> None:
        self.device = device
        self.batches: list[list[int]] = []
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self._fails = fails

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        values = [int(value) for value in crops[:, 0, 0, 0]]
        self.batches.append(values)
        self.entered.set()
        assert self.go_on.wait(120)
        if POISON in values:
            raise ValueError("poison")
        if problem := self._fails(values):
            raise problem
        rows = np.repeat(np.array(values, np.float32)[:, None], 192, axis=1)
        rows[rows == BLANK] = np.nan
        return rows


def held(engine: Recorder, loop: EncoderLoop, value: int = 0) -> Future[NDArray[np.float32]]:
    """Submits a crop and returns once the engine holds it."""
    engine.go_on.clear()
    future = loop.submit(crop(value))
    assert engine.entered.wait(120)
    return future


def wait_until(condition: Callable[[], bool]) -> None:
    assert any(condition() for _ in polls(every_s=0.002))


@pytest.mark.numeric
def test_the_loop_gives_what_the_published_pipeline_gives(parity_set: ParitySet) -> None:
    engine = Engine(load_checkpoint(parity_set.directory), device="cpu")
    parts = np.array_split(np.arange(len(parity_set.names)), 4)
    crops = parity_set.stacked_crops()
    with EncoderLoop(engine, streams=2) as loop, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda part: loop.embed(crops[part]), parts))
    assert np.abs(np.concatenate(results) - parity_set.embeddings).max() < EMBEDDING_TOLERANCE
    assert loop.stats().crops == len(crops)
    assert loop.stats().busy_s > 0


def test_urgent_crops_go_first_and_equals_in_order_of_arrival() -> None:
    engine = Recorder()
    with EncoderLoop(engine, streams=1, micro_batch=2, linger_ms=0) as loop:
        first = held(engine, loop)
        later = [loop.submit(crop(10 * priority + n), priority) for n in (1, 2) for priority in (0, 4, 9)]
        engine.go_on.set()
        assert [int(future.result(120)[0]) for future in [first, *later]] == [0, 1, 41, 91, 2, 42, 92]
    assert engine.batches == [[0], [91, 92], [41, 42], [1, 2]]


def test_within_a_priority_the_older_batch_goes_first() -> None:
    engine = Recorder()
    with EncoderLoop(engine, streams=1, micro_batch=2, linger_ms=0) as loop:
        held(engine, loop)
        later = [loop.submit(crop(10 * turn + n), 4, turn) for n in (1, 2) for turn in (2, 1)]
        later.append(loop.submit(crop(99), 9, 7))
        engine.go_on.set()
        for future in later:
            future.result(120)
    assert engine.batches == [[0], [99, 11], [12, 21], [22]]


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.one_of(st.integers(0, 20), st.sampled_from([POISON, BLANK])), min_size=1, max_size=24),
    micro_batch=st.integers(1, 9),
    streams=st.integers(1, 3),
)
def test_every_crop_gets_its_own_answer_whatever_its_neighbours_are(
    values: list[int], micro_batch: int, streams: int
) -> None:
    with EncoderLoop(Recorder(), streams=streams, micro_batch=micro_batch, linger_ms=1) as loop:
        futures = [loop.submit(crop(value), priority=value % 10) for value in values]
        for value, future in zip(values, futures, strict=True):
            if value == POISON:
                assert isinstance(future.exception(120), ValueError)
            elif value == BLANK:
                error = future.exception(120)
                assert isinstance(error, ImageRejectedError)
                assert error.reason is RejectReason.INTERNAL
            else:
                assert future.result(120).tolist() == [value] * 192
    bad = sum(value in (POISON, BLANK) for value in values)
    assert (loop.stats().crops, loop.stats().failed) == (len(values) - bad, bad)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no room")])
def test_a_batch_too_large_for_the_device_is_halved(error: Exception) -> None:
    engine = Recorder(lambda values: error if len(values) > 2 else None)
    with EncoderLoop(engine, streams=1, micro_batch=8, linger_ms=120_000) as loop:
        assert loop.embed([crop(value) for value in range(8)])[:, 0].tolist() == list(range(8))
    assert [len(batch) for batch in engine.batches] == [8, 4, 2, 2, 4, 2, 2]


def test_a_single_crop_that_finds_no_memory_is_to_be_tried_again() -> None:
    engine = Recorder(lambda _: torch.OutOfMemoryError("CUDA out of memory"))
    with EncoderLoop(engine, streams=1) as loop, pytest.raises(TransientError, match="out of memory") as caught:
        loop.embed([crop(1)])
    assert caught.value.reason is RejectReason.MODEL_UNAVAILABLE


def test_crops_of_several_callers_join_into_one_batch() -> None:
    engine = Recorder()
    with EncoderLoop(engine, streams=1, micro_batch=6, linger_ms=120_000) as loop:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda value: loop.submit(crop(value)).result(120), range(6)))
        assert [sorted(batch) for batch in engine.batches] == [[0, 1, 2, 3, 4, 5]]


def test_a_full_queue_blocks_its_callers_but_not_more_urgent_ones() -> None:
    engine, submitted = Recorder(), []
    with EncoderLoop(engine, streams=1, micro_batch=1, max_waiting=2) as loop:
        held(engine, loop)
        flood = threading.Thread(target=lambda: [submitted.append(loop.submit(crop(n), 1)) for n in range(1, 9)])
        flood.start()
        wait_until(lambda: len(submitted) == 2)
        urgent = loop.submit(crop(100), priority=9)
        assert loop.stats().waiting == 3
        assert len(submitted) == 2
        engine.go_on.set()
        assert urgent.result(120)[0] == 100
        flood.join(120)
        assert [int(future.result(120)[0]) for future in submitted] == list(range(1, 9))
    assert engine.batches[1] == [100]


def test_a_loop_is_busy_while_crops_wait_or_are_embedded() -> None:
    engine = Recorder(lambda values: ValueError("bad") if 7 in values else None)
    with EncoderLoop(engine, streams=2, micro_batch=2, linger_ms=0) as loop:
        assert not loop.busy
        first = held(engine, loop)
        assert loop.busy
        loop.submit(crop(1)).cancel()
        bad = loop.submit(crop(7))
        engine.go_on.set()
        assert first.result(120)[0] == 0
        assert isinstance(bad.exception(120), ValueError)
        wait_until(lambda: not loop.busy)


def test_closing_finishes_what_is_queued_and_refuses_more() -> None:
    loop = EncoderLoop(Recorder(), streams=2, micro_batch=3, linger_ms=20_000)
    futures = [loop.submit(crop(n)) for n in range(20)]
    loop.close()
    assert [int(future.result(0)[0]) for future in futures] == list(range(20))
    with pytest.raises(TransientError, match="closed") as caught:
        loop.submit(crop(1))
    assert caught.value.reason is RejectReason.MODEL_UNAVAILABLE
    loop.close()


def test_closing_frees_a_caller_that_waits_for_room() -> None:
    engine = Recorder()
    loop = EncoderLoop(engine, streams=1, micro_batch=1, max_waiting=1)
    held(engine, loop)
    loop.submit(crop(1))
    with ThreadPoolExecutor(2) as pool:
        blocked = pool.submit(loop.submit, crop(2))
        closing = pool.submit(loop.close)
        assert isinstance(blocked.exception(120), TransientError)
        engine.go_on.set()
        closing.result(120)
    assert engine.batches == [[0], [1]]


def test_a_cancelled_crop_is_never_embedded() -> None:
    engine = Recorder()
    with EncoderLoop(engine, streams=1, micro_batch=1) as loop:
        first = held(engine, loop)
        cancelled, last = loop.submit(crop(1)), loop.submit(crop(2))
        assert cancelled.cancel()
        engine.go_on.set()
        assert (first.result(120)[0], last.result(120)[0]) == (0, 2)
    assert engine.batches == [[0], [2]]


def test_embedding_several_raises_the_first_error_and_drops_the_rest() -> None:
    engine = Recorder()
    with EncoderLoop(engine, streams=1, micro_batch=1) as loop, pytest.raises(ValueError, match="poison"):
        loop.embed([crop(POISON), *(crop(n) for n in range(40))])
    assert loop.stats().waiting == 0


def test_a_lost_device_ends_the_loop_and_leaves_nobody_waiting() -> None:
    engine = Recorder(lambda _: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with EncoderLoop(engine, streams=1, micro_batch=2) as loop:
        first = held(engine, loop)
        waiting = [loop.submit(crop(n)) for n in range(3)]
        engine.go_on.set()
        for future in [first, *waiting]:
            assert isinstance(future.exception(120), TransientError)
        with pytest.raises(TransientError, match="illegal memory access"):
            loop.submit(crop(1))
        assert isinstance(loop.failure, torch.AcceleratorError)
    assert len(engine.batches) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_that_breaks_says_so_to_everyone() -> None:
    class Short(Recorder):
        def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
            return super().embed(crops)[:-1]

    engine = Short()
    with EncoderLoop(engine, streams=1, micro_batch=2) as loop:
        first = held(engine, loop)
        second = loop.submit(crop(1))
        engine.go_on.set()
        assert isinstance(first.exception(120), TransientError)
        assert isinstance(second.exception(120), TransientError)
        assert isinstance(loop.failure, ValueError)


@pytest.mark.parametrize("bad", [np.zeros((224, 224), np.uint8), np.zeros((224, 224, 3), np.float32)])
def test_a_crop_of_another_shape_or_type_is_refused_at_once(bad: NDArray[np.uint8]) -> None:
    with EncoderLoop(Recorder(), streams=1) as loop, pytest.raises(ValueError, match=r"\(224, 224, 3\) uint8"):
        loop.submit(bad)


def test_no_crops_give_no_rows() -> None:
    with EncoderLoop(Recorder(), streams=1) as loop:
        assert loop.embed([]).shape == (0, 192)


def test_defaults_follow_the_device() -> None:
    with EncoderLoop(Recorder(device="cuda:1")) as loop:
        assert (loop.streams, loop.micro_batch) == (2, 256)
    with EncoderLoop(Recorder()) as loop:
        assert loop.streams >= 1
        assert loop.micro_batch == 8
