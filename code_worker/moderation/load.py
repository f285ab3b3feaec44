"""From a stored release to a runtime on a device."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

from code_worker.errors import UnknownHeadError
from code_worker.heads import use_compute_device
from code_worker.logs import get_logger
from code_worker.moderation.lazy import LazyEmbedder
from code_worker.moderation.policy import DEFAULT_POLICY, Policy
from code_worker.moderation.runtime import Runtime

if TYPE_CHECKING:
    from code_worker.encoder.loop import EncoderLoop
    from code_worker.encoder.weights import EncoderWeights
    from code_worker.releases.registry import LoadedRelease
    from code_worker.settings import Settings

__all__ = ["embedding_key", "start_encoder", "start_runtime"]

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
    from code_worker.encoder.choice import open_engine
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
    engine.warm_up()
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
    if (own.low, own.high) == (DEFAULT_POLICY.low, DEFAULT_POLICY.high):
        return DEFAULT_POLICY
    return Policy(id=f"{loaded.id}:thresholds", low=own.low, high=own.high)


def embedding_key(encoder_sha256: str, precision: str) -> str:
    """Embeddings of another precision are other numbers: they are kept and reused under another name."""
    if precision == "fp32":
        return encoder_sha256
    return hashlib.sha256(f"{encoder_sha256}:{precision}".encode()).hexdigest()
