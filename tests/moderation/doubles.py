"""Sources, an encoder and heads small enough to see through, behind the same interfaces as the real ones."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from code_worker.heads import Head
from code_worker.moderation.runtime import Runtime
from code_worker.types import Fetched


def png(value: int, size: int = 224) -> bytes:
    """A grey image; its embedding by `MeanEmbedder` is `value / 255`."""
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(out, "PNG")
    return out.getvalue()


class DictSources:
    """Objects by URI; an exception in place of bytes is raised."""

    def __init__(self, objects: Mapping[str, bytes | Exception]) -> None:
        self.objects = dict(objects)
        self.fetched: list[str] = []
        self._lock = threading.Lock()

    def fetch(self, uri: str) -> Fetched:
        with self._lock:
            self.fetched.append(uri)
        found = self.objects[uri]
        if isinstance(found, Exception):
            raise found
        return Fetched(found, etag=f"etag-{uri}")


class MeanEmbedder:
    """Embeds a crop as its mean brightness, 192 times over."""

    def __init__(self, spoil: Callable[[NDArray[np.uint8]], Exception | None] = lambda _: None) -> None:
        self.crops = 0
        self.closed = False
        self.busy = False
        self.failure: BaseException | None = None
        self._spoil = spoil

    def submit(self, crop: NDArray[np.uint8], priority: int = 4, turn: int = 0) -> Future[NDArray[np.float32]]:
        self.crops += 1
        future: Future[NDArray[np.float32]] = Future()
        if (error := self._spoil(crop)) is not None:
            future.set_exception(error)
        else:
            future.set_result(np.full(192, crop.mean() / 255, dtype=np.float32))
        return future

    def close(self) -> None:
        self.closed = True


class FirstValueHead(Head):
    """Scores an embedding by its first number."""

    def fit(self, embeddings: NDArray[np.float32], labels: NDArray[np.int8]) -> FirstValueHead:
        return self

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        return embeddings[:, 0].copy()

    def save(self, directory: Path) -> None:
        (directory / "nothing").touch()

    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> FirstValueHead:
        return cls(options)


class PickyHead(FirstValueHead):
    """Fails on bright images, with its whole batch."""

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        if (embeddings[:, 0] > 0.9).any():
            raise ZeroDivisionError("too bright")
        return super().score(embeddings)


class BrokenHead(FirstValueHead):
    """Fails always."""

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        raise KeyError("weights")


class QuittingHead(FirstValueHead):
    """Ends the process, or would."""

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        sys.exit("no licence")


class ShoutingHead(FirstValueHead):
    """Returns what is no score."""

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.full(len(embeddings), 7.0, dtype=np.float32)


def runtime(embedder: MeanEmbedder | None = None, release: str = "r-test", **heads: Head) -> Runtime:
    named = heads or {"linear": FirstValueHead(), "knn": FirstValueHead()}
    return Runtime(
        release=release,
        manifest_sha256="m" * 64,
        encoder_sha256="e" * 64,
        embedder=embedder or MeanEmbedder(),
        heads=named,
        head_sha256=dict.fromkeys(named, "h" * 64),
        default_head=next(iter(named)),
    )
