"""An encoder that is started by the first crop."""

from __future__ import annotations

import numpy as np
import pytest

from code_worker.errors import TransientError
from code_worker.moderation.runtime import LazyEmbedder
from tests.moderation.doubles import MeanEmbedder

CROP = np.zeros((224, 224, 3), np.uint8)


def test_it_starts_once_and_only_when_it_is_used() -> None:
    started: list[MeanEmbedder] = []

    def start() -> MeanEmbedder:
        started.append(MeanEmbedder())
        return started[-1]

    lazy = LazyEmbedder(start)
    assert (started, lazy.busy, lazy.failure) == ([], False, None)
    for _ in range(2):
        assert lazy.submit(CROP).result()[0] == 0
    (embedder,) = started
    embedder.busy, embedder.failure = True, RuntimeError("device lost")
    assert lazy.busy
    assert lazy.failure is embedder.failure
    lazy.close()
    assert embedder.closed
    with pytest.raises(TransientError, match="is closed"):
        lazy.submit(CROP)


def test_one_that_was_never_used_is_closed_without_being_started() -> None:
    lazy = LazyEmbedder(MeanEmbedder)
    lazy.close()
    with pytest.raises(TransientError, match="is closed"):
        lazy.submit(CROP)


def test_an_encoder_that_does_not_start_is_not_tried_again() -> None:
    tries: list[int] = []

    def start() -> MeanEmbedder:
        tries.append(1)
        raise RuntimeError("CUDA out of memory")

    lazy = LazyEmbedder(start)
    for _ in range(2):
        with pytest.raises(TransientError, match="cannot be started: CUDA out of memory"):
            lazy.submit(CROP)
    assert len(tries) == 1
    assert isinstance(lazy.failure, RuntimeError)
