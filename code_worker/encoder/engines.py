"""Chooses the engine that runs the encoder: torch, or OpenVINO where it is installed and agrees with torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.encoder.torch_engine import CUDA_BATCH, Engine, resolve_device
from code_worker.errors import ConfigurationError
from code_worker.logs import get_logger
from code_worker.types import EMBEDDING_TOLERANCE

if TYPE_CHECKING:
    from code_worker.encoder.openvino_engine import OpenVinoEngine
    from code_worker.encoder.weights import EncoderWeights

ENGINES: Final = ("auto", "torch", "openvino")
_TRIED: Final = 8

log = get_logger(__name__)


def open_engine(
    weights: EncoderWeights,
    *,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "fp32",
    compile_kernels: bool = False,
    streams: int | None = None,
    largest_batch: int | None = None,
) -> Engine | OpenVinoEngine:
    """The engine of a name. `auto`: OpenVINO on a CPU where it is installed, else torch.

    OpenVINO embeds a few random crops first. If they differ from torch's by more than `EMBEDDING_TOLERANCE`, `auto`
    says so and takes torch; a setting that names OpenVINO is refused.

    Args:
        weights: the encoder.
        engine: one of `ENGINES`.
        device: as `Engine` has it; OpenVINO is for `cpu`.
        precision: as `Engine` has it; OpenVINO is for `fp32`.
        compile_kernels: as `Engine` has it.
        streams: calls at the same time; unset: as the engine likes.
        largest_batch: crops of one pass on CUDA.

    Raises:
        ConfigurationError: an engine, device or precision that is unknown, not there, or does not go with the others.
    """
    if engine not in ENGINES:
        raise ConfigurationError(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    fits = resolve_device(device) == "cpu" and precision == "fp32"
    if engine == "openvino" and not fits:
        raise ConfigurationError(f"engine 'openvino' is for device cpu in fp32, not {device} in {precision}")
    if engine == "openvino" and find_spec("openvino") is None:
        raise ConfigurationError("engine 'openvino' is not installed: pip install 'code-worker[openvino]'")
    if engine == "openvino" or (engine == "auto" and fits and find_spec("openvino") is not None):
        from code_worker.encoder.openvino_engine import OpenVinoEngine  # an extra

        chosen = OpenVinoEngine(weights, streams=streams)
        if (difference := _difference(chosen, weights)) <= EMBEDDING_TOLERANCE:
            return chosen
        fault = f"OpenVINO's embeddings differ from torch's by {difference:.1e} on this machine"
        if engine == "openvino":
            raise ConfigurationError(f"{fault}; use engine torch")
        log.warning("engine_refused", engine="openvino", fault=fault)
    return Engine(
        weights,
        device=device,
        precision=precision,
        compile_kernels=compile_kernels,
        lanes=streams or 2,
        largest_batch=largest_batch or CUDA_BATCH,
    )


def _difference(engine: OpenVinoEngine, weights: EncoderWeights) -> float:
    crops = np.random.default_rng(0).integers(0, 256, (_TRIED, 224, 224, 3), dtype=np.uint8)
    found, expected = engine.embed(crops), Engine(weights, device="cpu").embed(crops)
    difference = float(np.abs(found - expected).max())
    return difference if np.isfinite(difference) else float("inf")
