"""The stored form of an embedding is the same on every machine, and what is not one is no embedding."""

from __future__ import annotations

import struct

import numpy as np

from code_worker.moderation.vectors import pack, unpack
from code_worker.types import EMBEDDING_DIM


def test_an_embedding_is_stored_as_little_endian_numbers_and_read_back() -> None:
    embedding = np.random.default_rng(0).standard_normal(EMBEDDING_DIM).astype(np.float32)
    stored = pack(embedding)
    assert stored == struct.pack(f"<{EMBEDDING_DIM}f", *embedding.tolist())
    assert pack(embedding.astype(">f4")) == stored
    read = unpack({"a": stored})["a"]
    assert read.dtype == np.float32
    assert np.array_equal(read, embedding)
    read[0] = 0.0


def test_rows_of_another_length_are_left_out() -> None:
    assert unpack({"short": bytes(4 * EMBEDDING_DIM - 1), "empty": b""}) == {}
