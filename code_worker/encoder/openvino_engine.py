"""The encoder on a CPU through OpenVINO, whose kernels use what torch's leave unused on many processors."""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.encoder.engine import check_crops
from code_worker.encoder.forward import CropEncoder
from code_worker.types import EMBEDDING_DIM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights

__all__ = ["OpenVinoEngine"]

_SIZES: Final = (4, 1)
"""Crops per pass. Larger passes are no faster, and every size is a model of its own."""

_CORE_LOCK: Final = threading.Lock()
"""`cache` alone lets two threads make one each, of which one is destroyed."""


class OpenVinoEngine:
    """Embeds crops in float32; any number of threads may call it at once, each with a stream of its own.

    Attributes:
        device: `cpu`.
        precision: `fp32`: OpenVINO would choose bf16 by itself where the processor has it, and move embeddings.
        name: `openvino`.
    """

    device = "cpu"
    precision = "fp32"
    name = "openvino"

    def __init__(self, weights: EncoderWeights, *, streams: int | None = None) -> None:
        """Compiles the model, which takes about half a second.

        Args:
            weights: the encoder.
            streams: calls that run at the same time; unset: one per core that this process may use.
        """
        import openvino as ov  # noqa: PLC0415 - optional, and 0.4 s

        from code_worker.encoder.openvino_graph import encoder_graph  # noqa: PLC0415 - as above

        cores = _usable_cores()
        chosen = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": streams or cores,
            "INFERENCE_NUM_THREADS": cores,
            # Two worker processes on one machine would otherwise be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        encoder = CropEncoder(weights.config, weights.state)
        self._models = {
            size: _the_core().compile_model(encoder_graph(encoder, size), "CPU", chosen) for size in _SIZES
        }
        self._own = threading.local()
        self.kernels = f"OpenVINO {ov.__version__.partition('-')[0]}"

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`: the CLS token after the final LayerNorm, not normalised.

        Raises:
            ValueError: another shape or type.
        """
        check_crops(crops)
        crops = np.require(crops, requirements=["C"])
        embeddings = np.empty((len(crops), EMBEDDING_DIM), np.float32)
        start = 0
        for size in _SIZES:
            request = self._request(size)
            while len(crops) - start >= size:
                request.infer([crops[start : start + size]], share_inputs=True)
                embeddings[start : start + size] = request.get_output_tensor().data
                start += size
        return embeddings

    def warm_up(self, crops: int = 1) -> None:
        """Runs a black batch, so that no image waits for memory to be reserved."""
        self.embed(np.zeros((max(crops, sum(_SIZES)), 224, 224, 3), np.uint8))

    def _request(self, size: int) -> Any:
        """This thread's own room for inputs and outputs."""
        if not hasattr(self._own, "requests"):
            self._own.requests = {size: model.create_infer_request() for size, model in self._models.items()}
        return self._own.requests[size]


def _the_core() -> Any:
    with _CORE_LOCK:
        return _core()


@functools.cache
def _core() -> Any:
    """One for as long as the process lives.

    Its CPU plugin gives the thread that makes it a stack for signals and takes it away when it is destroyed, from
    whichever thread that happens. The main thread of a worker that swapped its release died of the next signal.
    """
    import openvino as ov  # noqa: PLC0415 - as above

    return ov.Core()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
