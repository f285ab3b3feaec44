"""A release ready to judge: its encoder's loop and its heads, held together so that no verdict mixes two releases."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from code_worker.errors import TransientError, UnknownHeadError
from code_worker.heads import Head, use_compute_device
from code_worker.logs import get_logger
from code_worker.moderation.policy import DEFAULT_POLICY, Policy
from code_worker.types import RejectReason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from code_worker.encoder.loop import EncoderLoop
    from code_worker.encoder.weights import EncoderWeights
    from code_worker.releases.loading import LoadedRelease
    from code_worker.settings import Settings
    from code_worker.types import Fetched

KnownEmbeddings = Callable[[str, Sequence[str]], Mapping[str, bytes]]


class Fetcher(Protocol):
    """A source of bytes."""

    def fetch(self, uri: str) -> Fetched:
        """The bytes of one object; raises ImageRejectedError or TransientError."""


class Embedder(Protocol):
    """Turns crops into embeddings; in a worker the process's one encoder loop."""

    @property
    def failure(self) -> BaseException | None:
        """Returns what ended the device for good; the process should then be replaced."""

    @property
    def busy(self) -> bool:
        """True if crops wait or are being embedded at this moment."""

    def submit(self, crop: NDArray[np.uint8], priority: int = 4, turn: int = 0) -> Future[NDArray[np.float32]]:
        """Queues one `(224, 224, 3) uint8` crop; the future yields its `(192,) float32` embedding.

        Higher priorities come first, then lower turns.
        """

    def close(self) -> None:
        """Finishes what is queued and frees the device."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything of one release that judging needs.

    Attributes:
        release: release id.
        manifest_sha256: hash of its manifest.
        encoder_sha256: hash of its encoder and precision; embeddings are kept under it, so that a refit reuses them.
        embedder: the encoder.
        heads: fitted heads by name.
        head_sha256: hash of each head's files.
        default_head: head used when nobody names one.
        default_policy: thresholds of the release, for jobs that no policy covers.
        head_plugins: distribution and version of what loaded each head.
        precision: arithmetic of the encoder; a verdict's code version names it when it is not fp32.
    """

    release: str
    manifest_sha256: str
    encoder_sha256: str
    embedder: Embedder
    heads: Mapping[str, Head]
    head_sha256: Mapping[str, str]
    default_head: str
    default_policy: Policy = DEFAULT_POLICY
    head_plugins: Mapping[str, str] = field(default_factory=dict)
    precision: str = "fp32"


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
                    # Under the lock: of threads that come together one starts it, the others wait for that.
                    self._started = self._start()
                except Exception as error:
                    # Anything a device raises: out of memory, above all.
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


log = get_logger(__name__)


def start_runtime(
    loaded: LoadedRelease, settings: Settings, *, lazy: bool = False, streams: int | None = None
) -> Runtime:
    """Puts the encoder on its device, warms it up and starts its loop.

    Args:
        loaded: the release.
        settings: device, precision and how the loop is driven.
        lazy: do so when the first crop comes, for those who may need none.
        streams: of the loop; unset: as the settings say.

    Raises:
        ConfigurationError: a device or precision that this machine lacks, or a default head the release lacks.
    """
    # Before the encoder: a misspelt head must not cost the minute that a device takes to warm up.
    default_head = settings.head or loaded.manifest.default_head
    if default_head is None or default_head not in loaded.heads:
        raise UnknownHeadError(str(default_head), tuple(sorted(loaded.heads)))
    start = partial(start_encoder, loaded.weights, settings, streams)
    return Runtime(
        release=loaded.id,
        manifest_sha256=loaded.manifest_sha256,
        encoder_sha256=embedding_key(loaded.encoder_sha256, settings.precision),
        embedder=LazyEmbedder(start) if lazy else start(),
        heads=loaded.heads,
        head_sha256=loaded.head_sha256,
        head_plugins=loaded.head_plugins,
        default_head=default_head,
        default_policy=_thresholds(loaded),
        precision=settings.precision,
    )


def start_encoder(weights: EncoderWeights, settings: Settings, streams: int | None = None) -> EncoderLoop:
    """Puts an encoder on its device, warms it up and starts the loop that serves this process.

    Args:
        weights: the encoder.
        settings: engine, device, precision and how the loop is driven.
        streams: of the loop; unset: as the settings say.

    Raises:
        ConfigurationError: a device or precision that this machine lacks.
    """
    from code_worker.encoder.engines import open_engine
    from code_worker.encoder.loop import EncoderLoop

    worker = settings.worker
    streams = streams or worker.streams
    engine = open_engine(
        weights,
        engine=settings.engine,
        device=settings.device,
        precision=settings.precision,
        compile_kernels=worker.compile is not False,
        streams=streams,
        largest_batch=worker.micro_batch,
    )
    # First calls compile kernels and choose algorithms: no live image should wait for that.
    engine.warm_up()
    # Before any head scores: a head that searches millions of references puts them on this device.
    use_compute_device(engine.device)
    if engine.device == "cpu":
        _one_blas_thread()
    log.info("encoder_ready", engine=engine.name, device=engine.device, kernels=engine.kernels)
    return EncoderLoop(engine, streams=streams, micro_batch=worker.micro_batch, linger_ms=worker.linger_ms)


def _one_blas_thread() -> None:
    """Heads multiply beside the encoder's streams, which have a core each.

    A product on several threads ends when the last of them gets its core back: measured on two busy cores, a head's
    batch took ten times as long as on one thread.
    """
    from threadpoolctl import ThreadpoolController  # looks through all loaded libraries

    ThreadpoolController().select(internal_api="openblas").limit(limits=1)


def _thresholds(loaded: LoadedRelease) -> Policy:
    own = loaded.manifest.thresholds
    # The same thresholds are the same policy: verdicts of releases that did not move them name one id.
    if (own.low, own.high) == (DEFAULT_POLICY.low, DEFAULT_POLICY.high):
        return DEFAULT_POLICY
    return Policy(id=f"{loaded.id}:thresholds", low=own.low, high=own.high)


def embedding_key(encoder_sha256: str, precision: str) -> str:
    """Embeddings of another precision are other numbers: they are kept and reused under another name."""
    if precision == "fp32":
        return encoder_sha256
    return hashlib.sha256(f"{encoder_sha256}:{precision}".encode()).hexdigest()
