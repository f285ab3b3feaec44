"""The encoder on a CPU through OpenVINO, whose kernels use what torch's leave unused on many processors."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.encoder.engine import check_crops
from code_worker.encoder.forward import CropEncoder
from code_worker.machine import usable_cores
from code_worker.types import EMBEDDING_DIM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights

__all__ = ["OpenVinoEngine"]

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
        """Compiles the model, which takes about a third of a second.

        Args:
            weights: the encoder.
            streams: calls that run at the same time; unset: one per core that this process may use.
        """
        from code_worker.encoder.openvino_graph import encoder_graph
        from code_worker.encoder.openvino_library import openvino

        cores = usable_cores()
        chosen = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": streams or cores,
            "INFERENCE_NUM_THREADS": cores,
            # Two worker processes on one machine would otherwise be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        # One crop a pass: larger passes are no faster, and so a row has the same bits whatever is in its batch.
        graph = encoder_graph(CropEncoder(weights.config, weights.state))
        self._model = _the_core().compile_model(graph, "CPU", chosen)
        self._own = threading.local()
        self.kernels = f"OpenVINO {openvino.__version__.partition('-')[0]}"

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`: the CLS token after the final LayerNorm, not normalised.

        A row depends on its own crop only, to the last bit.

        Raises:
            ValueError: another shape or type.
        """
        check_crops(crops)
        crops = np.require(crops, requirements=["C"])
        embeddings = np.empty((len(crops), EMBEDDING_DIM), np.float32)
        request = self._request()
        for number in range(len(crops)):
            request.infer([crops[number : number + 1]], share_inputs=True)
            embeddings[number] = request.get_output_tensor().data[0]
        return embeddings

    def warm_up(self, crops: int = 1) -> None:
        """Runs a black batch, so that no image waits for memory to be reserved."""
        self.embed(np.zeros((crops, 224, 224, 3), np.uint8))

    def _request(self) -> Any:
        """This thread's own room for inputs and outputs."""
        if not hasattr(self._own, "request"):
            self._own.request = self._model.create_infer_request()
        return self._own.request


def _the_core() -> Any:
    with _CORE_LOCK:
        return _core()


@functools.cache
def _core() -> Any:
    """One for as long as the process lives.

    Its CPU plugin gives the thread that makes it a stack for signals and takes it away when it is destroyed, from
    whichever thread that happens. The main thread of a worker that swapped its release died of the next signal.
    """
    from code_worker.encoder.openvino_library import openvino

    return openvino.Core()
