"""An encoder that is put on its device when the first crop comes, for work that may need none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from code_worker.errors import TransientError
from code_worker.types import RejectReason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from code_worker.moderation.runtime import Embedder

__all__ = ["LazyEmbedder"]


class LazyEmbedder:
    """An `Embedder` that costs no memory until it is used: stored embeddings may be all that is asked for."""

    def __init__(self, start: Callable[[], Embedder]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._started: Embedder | None = None
        self._closed = False
        self._failure: BaseException | None = None

    @property
    def failure(self) -> BaseException | None:
        """See `Embedder.failure`; an encoder that could not be started has failed for good."""
        return self._failure or (self._started.failure if self._started else None)

    @property
    def busy(self) -> bool:
        """See `Embedder.busy`."""
        return self._started.busy if self._started else False

    def submit(self, crop: NDArray[np.uint8], priority: int = 4, turn: int = 0) -> Future[NDArray[np.float32]]:
        """See `Embedder.submit`; the first call returns once the encoder stands.

        Raises:
            TransientError: the encoder cannot be started, or is closed.
        """
        return self._get().submit(crop, priority, turn)

    def _get(self) -> Embedder:
        with self._lock:
            if self._closed or self._failure is not None:
                what = "is closed" if self._failure is None else f"cannot be started: {self._failure}"
                raise TransientError(RejectReason.MODEL_UNAVAILABLE, f"the encoder {what}")
            if self._started is None:
                try:
                    self._started = self._start()
                except Exception as error:
                    # Whatever a device raises: out of memory, above all.
                    self._failure = error
                    raise TransientError(
                        RejectReason.MODEL_UNAVAILABLE, f"the encoder cannot be started: {error}"
                    ) from error
            return self._started

    def close(self) -> None:
        """See `Embedder.close`."""
        with self._lock:
            self._closed = True
        if self._started is not None:
            self._started.close()
