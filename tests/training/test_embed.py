from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits

from code_worker import heads
from code_worker.data.datasets.examples import FAKE, REAL, Example
from code_worker.data.kept_copies import open_kept
from code_worker.encoder.weights import random_weights
from code_worker.errors import DatasetError, ImageRejectedError, SourceCredentialsError, StorageError, TransientError
from code_worker.settings import LimitSettings, Settings
from code_worker.store.engine import Store
from code_worker.training.embed import Embedded, embed_examples
from code_worker.training.snapshot_embeddings import open_encoder
from code_worker.types import RejectReason
from tests.moderation.doubles import MeanEmbedder, png

LIMITS = LimitSettings()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def example(key: str, content: bytes | Exception, **facts: object) -> Example:
    def read() -> bytes:
        if isinstance(content, Exception):
            raise content
        return content

    return Example(key=key, label=REAL, read=read, **facts)  # type: ignore[arg-type]


def values(embedded: Embedded) -> list[int]:
    return [round(255 * float(row[0])) for row in embedded.embeddings]


def test_order_is_kept_and_hashes_are_filled_in_over_many_pages() -> None:
    numbers = np.random.default_rng(0).permutation(200).tolist()
    contents = [png(value, 8) for value in numbers]
    brightness = {sha256(data): value for value, data in zip(numbers, contents, strict=True)}
    advanced: list[int] = []
    found = embed_examples(
        (example(f"{value}.png", data) for value, data in zip(numbers, contents, strict=True)),
        MeanEmbedder(),
        LIMITS,
        crop=lambda data: np.full((224, 224, 3), brightness[sha256(data)], np.uint8),
        progress=advanced.append,
    )
    assert values(found) == numbers
    assert [one.sha256 for one in found.examples] == list(brightness)
    assert found.embeddings.shape == (200, 192)
    assert found.embeddings.dtype == np.float32
    assert sum(advanced) == 200


def test_nothing_gives_an_empty_matrix() -> None:
    found = embed_examples([], MeanEmbedder(), LIMITS)
    assert (found.examples, found.embeddings.shape, found.skipped) == ((), (0, 192), ())


def test_same_bytes_are_embedded_once_and_given_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("code_worker.training.embed._PAGE", 2)
    embedder = MeanEmbedder()
    keys = [f"{number}.png" for number in range(7)]
    found = embed_examples([example(key, png(50)) for key in keys], embedder, LIMITS)
    assert values(found) == [50] * 7
    assert [one.key for one in found.examples] == keys
    assert embedder.crops == 1


def test_what_cannot_be_used_is_skipped_with_its_reason_and_touches_nothing_else() -> None:
    def spoil(crop: NDArray[np.uint8]) -> Exception | None:
        return ImageRejectedError(RejectReason.INTERNAL, "no embedding") if crop.mean() == 9 else None

    found = embed_examples(
        [
            example("gone", DatasetError("gone from storage")),
            example("good", png(10)),
            example("broken", b"no image at all, and long enough"),
            example("broken twin", b"no image at all, and long enough"),
            example("late", TransientError(RejectReason.FETCH_TIMEOUT, "30 s")),
            example("spoilt", png(9)),
            example("changed", png(11), sha256="0" * 64),
        ],
        MeanEmbedder(spoil),
        LIMITS,
    )
    assert [one.key for one in found.examples] == ["good"]
    reasons = {one.key: one.reason for one in found.skipped}
    assert reasons["gone"] == "gone from storage"
    assert reasons["broken"] == reasons["broken twin"]
    assert reasons["broken"].startswith("unsupported_format")
    assert reasons["late"] == "fetch_timeout: 30 s"
    assert reasons["spoilt"] == "internal: no embedding"
    assert "not " + "0" * 64 in reasons["changed"]
    assert [one.key for one in found.skipped] == ["gone", "broken", "broken twin", "late", "spoilt", "changed"]


def test_an_embedding_that_is_not_finite_is_skipped() -> None:
    class Broken(MeanEmbedder):
        def submit(self, crop: NDArray[np.uint8], priority: int = 4, turn: int = 0):  # type: ignore[no-untyped-def]
            future = super().submit(crop, priority, turn)
            future.result()[3] = np.nan
            return future

    found = embed_examples([example("a", png(1))], Broken(), LIMITS)
    assert found.examples == ()
    assert "not finite" in found.skipped[0].reason


@pytest.mark.parametrize("stated", [True, False])
def test_known_vectors_are_reused_and_new_ones_kept(stated: bool) -> None:
    embedder = MeanEmbedder()
    store: dict[str, bytes] = {}
    asked: list[Sequence[str]] = []
    reads: list[str] = []

    def known(hashes: Sequence[str]) -> Mapping[str, bytes]:
        asked.append(hashes)
        return {one: store[one] for one in hashes if one in store}

    def counted(value: int) -> Example:
        data = png(value)

        def read() -> bytes:
            reads.append(str(value))
            return data

        return Example(str(value), FAKE, read, sha256=sha256(data) if stated else None)

    examples = [counted(value) for value in range(1, 6)]
    first = embed_examples(examples, embedder, LIMITS, known=known, keep=store.update)
    assert (embedder.crops, len(store), len(reads)) == (5, 5, 5)
    assert {len(vector) for vector in store.values()} == {768}
    second = embed_examples([*examples, counted(6)], embedder, LIMITS, known=known, keep=store.update)
    assert embedder.crops == 6
    assert np.array_equal(second.embeddings[:5], first.embeddings)
    assert len(reads) == (6 if stated else 11), "what is known beforehand is not read again"
    assert all(len(hashes) > 1 for hashes in asked[:1]), "hashes are looked up together, not one by one"


def test_a_crop_of_ones_own_neither_looks_up_nor_keeps() -> None:
    def never(*_: object) -> Mapping[str, bytes]:
        raise AssertionError("a transformed image has another embedding")

    found = embed_examples(
        [example("a", png(7))],
        MeanEmbedder(),
        LIMITS,
        known=never,
        keep=never,
        crop=lambda _: np.full((224, 224, 3), 80, np.uint8),
    )
    assert values(found) == [80]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 129])
def test_every_image_of_every_page_comes_through(size: int) -> None:
    contents = [png(index % 256, 4 + index // 256) for index in range(size)]
    found = embed_examples(
        [example(str(index), data) for index, data in enumerate(contents)],
        MeanEmbedder(),
        LIMITS,
        crop=lambda data: np.full((224, 224, 3), data[-20] % 7, np.uint8),
    )
    assert [one.key for one in found.examples] == [str(index) for index in range(size)]


def test_no_more_than_two_pages_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("code_worker.training.embed._PAGE", 4)
    taken = 0
    ahead: list[int] = []
    lock = threading.Lock()
    done = 0

    def endless() -> object:
        nonlocal taken
        for number in range(40):
            taken += 1
            with lock:
                ahead.append(taken - done)
            yield example(str(number), png(number))

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count

    embed_examples(endless(), MeanEmbedder(), LIMITS, progress=advance)  # type: ignore[arg-type]
    assert done == 40
    assert max(ahead) <= 4 * 4


@pytest.mark.parametrize(
    "fail",
    [
        lambda: (example("a", SourceCredentialsError("s3", "expired")), MeanEmbedder()),
        lambda: (example("a", StorageError("the dataset storage is away")), MeanEmbedder()),
        lambda: (
            example("a", png(1)),
            MeanEmbedder(lambda _: TransientError(RejectReason.MODEL_UNAVAILABLE, "the device failed")),
        ),
    ],
)
def test_what_would_fail_for_every_image_ends_the_work(fail: Callable[[], tuple[Example, MeanEmbedder]]) -> None:
    broken, embedder = fail()
    with pytest.raises((TransientError, StorageError)):
        embed_examples([broken], embedder, LIMITS)


def test_an_encoder_that_learns_is_started_as_one_that_judges(
    tmp_path: Path, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it runs is said to the heads, and they get one thread for their products beside its streams."""
    monkeypatch.setattr(heads, "_device", "cuda:7")
    settings = Settings(data_dir=tmp_path, device="cpu")
    data = png(40, 8)
    with (
        threadpool_limits(),
        open_encoder(
            random_weights(0, depth=2), "0" * 64, settings=settings, store=sqlite_store, kept=open_kept(settings)
        ) as encoder,
    ):
        seen = encoder.see_examples([example("one.png", data)])
        threads = {pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"}
    assert list(seen.rows) == [sha256(data)]
    assert heads.compute_device() == "cpu"
    assert threads == {1}


def test_the_failure_that_ended_the_work_is_told_and_the_source_is_left_alone() -> None:
    reads: list[int] = []

    def away(number: int) -> Example:
        def read() -> bytes:
            reads.append(number)
            raise StorageError(f"image {number}: the dataset storage is away")

        return Example(str(number), REAL, read)

    with pytest.raises(StorageError, match="the dataset storage is away"):
        embed_examples(map(away, range(500)), MeanEmbedder(), LIMITS, threads=2)
    assert len(reads) <= 4, "not all images try it, each for as long as it takes"
