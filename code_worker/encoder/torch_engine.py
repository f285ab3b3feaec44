"""The encoder on a device through torch: uint8 crops in, float32 embeddings out."""

from __future__ import annotations

import queue
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from code_worker.encoder.forward import CropEncoder
from code_worker.encoder.weights import EncoderWeights
from code_worker.errors import ConfigurationError
from code_worker.logs import get_logger
from code_worker.types import EMBEDDING_DIM, IMAGE_SIZE

log = get_logger(__name__)

Crops = NDArray[np.uint8]
Embeddings = NDArray[np.float32]

_SMALLEST = 8
# torch's own rule before a capture: workspaces and autotuning settle within three passes.
_PASSES_BEFORE_CAPTURE = 3


def batch_shapes(largest: int) -> tuple[int, ...]:
    """Batch sizes that kernels are prepared for: 8, doubled until `largest` crops fit."""
    shapes = [_SMALLEST]
    while shapes[-1] < largest:
        shapes.append(2 * shapes[-1])
    return tuple(shapes)


class DeviceStream:
    """One caller's way to the device: its stream, its buffers and its recorded graphs. Not thread safe.

    Crops are copied into pinned memory, from there without blocking to the device, and padded up to the next shape
    with what the buffer held before: a row depends on its own crop only. On a CPU there is no stream and nothing
    is pinned or recorded; the rest is the same.
    """

    def __init__(self, encoder: CropEncoder, device: torch.device, shapes: tuple[int, ...]) -> None:
        self._encoder = encoder
        self._shapes = shapes
        self._device = device
        cuda = device.type == "cuda"
        crops = (shapes[-1], IMAGE_SIZE, IMAGE_SIZE, 3)
        self._staged = torch.zeros(crops, dtype=torch.uint8, device="cpu", pin_memory=cuda)
        self._answer = torch.zeros((shapes[-1], EMBEDDING_DIM), dtype=torch.float32, device="cpu", pin_memory=cuda)
        self._crops = torch.zeros(crops, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device) if cuda else None
        # A blocking event lets the waiting thread sleep; the stream's own wait would spin on a core that decodes.
        self._done = torch.cuda.Event(blocking=True) if cuda else None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if cuda:
            torch.cuda.synchronize(device)  # the buffers were filled on the current stream, not on the lane's

    def run(self, crops: Crops) -> Embeddings:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`, for n from 1 to the largest shape."""
        count = len(crops)
        shape = next(shape for shape in self._shapes if shape >= count)
        np.copyto(self._staged.numpy()[:count], crops)
        with torch.inference_mode(), self._on_stream():
            self._crops[:count].copy_(self._staged[:count], non_blocking=True)
            self._answer[:count].copy_(self._embed(shape)[:count], non_blocking=True)
            if self._done is not None:
                self._done.record(self._stream)
        if self._done is not None:
            self._done.synchronize()
        return self._answer.numpy()[:count].copy()

    def rehearse(self, shape: int) -> None:
        """One pass of what the device holds: compiles, loads and tunes the kernels of this shape."""
        with torch.inference_mode(), self._on_stream():
            self._embed(shape)
        if self._stream is not None:
            self._stream.synchronize()

    def record(self) -> None:
        """Captures a graph per shape, largest first: the smaller ones then live in the memory of the larger.

        The graphs of one lane may share a pool because each starts from the lane's crops and its answer is copied
        out before the next is replayed, and because a lane never runs two at a time.
        """
        pool = torch.cuda.graph_pool_handle()
        for shape in reversed(self._shapes):
            for _ in range(_PASSES_BEFORE_CAPTURE):
                self.rehearse(shape)
            graph = torch.cuda.CUDAGraph()
            with (
                torch.inference_mode(),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                answer = self._encoder(self._crops[:shape])
            self._graphs[shape] = (graph, answer)

    def forget(self) -> None:
        """Drops the recorded graphs and the memory they hold."""
        self._graphs.clear()

    def _embed(self, shape: int) -> Tensor:
        if recorded := self._graphs.get(shape):
            graph, answer = recorded
            graph.replay()
            return answer
        return cast("Tensor", self._encoder(self._crops[:shape]))

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


class StreamPool:
    """Streams that any number of threads share: each call has one for itself, further callers wait for it.

    Attributes:
        shapes: batch sizes; a larger batch is cut into several passes.
        mode: `plain`; after `prepare` what came of it: `compiled and recorded`, `recorded` or `plain`.
    """

    def __init__(self, encoder: CropEncoder, device: str, *, lanes: int, largest_batch: int) -> None:
        self.shapes = batch_shapes(largest_batch)
        self.mode = "plain"
        self._encoder = encoder
        self._device = torch.device(device)
        self._all = [DeviceStream(encoder, self._device, self.shapes) for _ in range(lanes)]
        self._free: queue.LifoQueue[DeviceStream] = queue.LifoQueue()
        for lane in self._all:
            self._free.put(lane)

    def run(self, crops: Crops) -> Embeddings:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`, for n of at least 1."""
        largest = self.shapes[-1]
        with self._borrowed() as lane:
            parts = [lane.run(crops[start : start + largest]) for start in range(0, len(crops), largest)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rehearse(self, shape: int) -> None:
        """One pass of a batch that lies on the device already, until it is done."""
        with self._borrowed() as lane:
            lane.rehearse(shape)

    def prepare(self) -> None:
        """Compiles the kernels for every shape and records them per lane; call it before others use the lanes.

        Anything that cannot be had is left out with a warning: without a compiler kernels are recorded as torch has
        them, without room for the graphs they are launched one by one.

        Raises:
            torch.AcceleratorError: the device does not work without all this either.
        """
        compiled = self._attempt("encoder_not_compiled", self._compile)
        if not compiled:
            self._encoder.use_plain_kernels()
        recorded = self._device.type == "cuda" and self._attempt("encoder_not_recorded", self._record)
        if not recorded:
            self._forget()
        self.mode = {(True, True): "compiled and recorded", (True, False): "compiled", (False, True): "recorded"}.get(
            (compiled, recorded), "plain"
        )
        self._all[0].rehearse(self.shapes[0])

    def _compile(self) -> None:
        self._encoder.compile_kernels()
        for shape in self.shapes:
            self._all[0].rehearse(shape)

    def _record(self) -> None:
        for lane in self._all:
            lane.record()

    def _forget(self) -> None:
        for lane in self._all:
            lane.forget()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _attempt(self, event: str, step: Callable[[], None]) -> bool:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - compilers raise anything; plain kernels give the same answers
            log.warning(event, error=str(error).strip().partition("\n")[0], kind=type(error).__name__)
            return False
        return True

    @contextmanager
    def _borrowed(self) -> Iterator[DeviceStream]:
        lane = self._free.get()
        try:
            yield lane
        except torch.OutOfMemoryError:
            # The caller will try with half as many: what this pass held must be free by then.
            torch.cuda.empty_cache()
            raise
        finally:
            self._free.put(lane)


# On an H100 some milliseconds of work: enough to hide launches and copies, too little to make a batch wait.
CUDA_BATCH = 256
CROP_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICE = re.compile(r"cpu|cuda(?::(?P<index>\d+))?")


class Engine:
    """Embeds crops; any number of threads may call it at once.

    Building one is what first touches the device, so it is built in the process that uses it, never before a fork.
    The number of torch's own threads is the caller's to set: it is a property of the calling thread.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        precision: `fp32`, `bf16` or `fp16`.
        name: `torch`.
    """

    name = "torch"

    def __init__(
        self,
        weights: EncoderWeights,
        *,
        device: str = "auto",
        precision: str = "fp32",
        fold: bool = True,
        compile_kernels: bool = False,
        lanes: int = 2,
        largest_batch: int = CUDA_BATCH,
    ) -> None:
        """Puts the weights on the device.

        Args:
            weights: the encoder.
            device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
            precision: bf16 and fp16 move embeddings by about 1e-2 and are for CUDA only.
            fold: put the normalisation into the patch projection; equal but for rounding, and faster.
            compile_kernels: let `warm_up` fuse and record the kernels; CUDA only, ignored on a CPU.
            lanes: calls that a CUDA device serves at once; further ones wait.
            largest_batch: crops of one pass on CUDA; larger batches take several.

        Raises:
            ConfigurationError: a device that is not there, or a precision that is unknown or not for this device.
        """
        if precision not in _DTYPES:
            raise ConfigurationError(f"precision {precision!r} is unknown; choose one of {', '.join(_DTYPES)}")
        self.device = resolve_device(device)
        self.precision = precision
        if self.device == "cpu" and precision != "fp32":
            raise ConfigurationError(
                f"precision {precision!r} is for CUDA devices: on a CPU it moves embeddings by 1e-2 and more "
                "and gains nothing; use fp32"
            )
        encoder = CropEncoder(weights.config, weights.state, fold=fold, dtype=_DTYPES[precision])
        self._encoder = encoder.to(self.device)
        self._compile_kernels = compile_kernels
        self._lanes: StreamPool | None = None
        if self.device != "cpu":
            self._lanes = StreamPool(self._encoder, self.device, lanes=lanes, largest_batch=largest_batch)

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`: the CLS token after the final LayerNorm, not normalised.

        What else is in the batch moves a row by rounding alone, as sums are taken in another order: in fp32 within
        `EMBEDDING_TOLERANCE`. A row that is not finite (an overflow in fp16) is handed out as it is: `EncoderLoop`
        turns it into that crop's error.

        Raises:
            ValueError: another shape or type.
        """
        check_crops(crops)
        if not len(crops):
            return np.empty((0, EMBEDDING_DIM), np.float32)
        if self._lanes is not None:
            return self._lanes.run(crops)
        # torch warns of arrays it could write to but must not, such as those that Pillow hands out.
        writable = np.require(crops, requirements=["C", "W"])
        with torch.inference_mode():
            embeddings: NDArray[np.float32] = self._encoder(torch.from_numpy(writable).to(self.device)).cpu().numpy()
        return embeddings

    @property
    def kernels(self) -> str:
        """`plain`, `compiled`, `recorded` or `compiled and recorded`; see `StreamPool`."""
        return self._lanes.mode if self._lanes is not None else "plain"

    def warm_up(self, crops: int = 1) -> None:
        """Runs a black batch, so that no image waits for kernels to be loaded or memory to be reserved.

        With `compile_kernels` on CUDA it prepares every batch size first, which takes a minute or two. To be called
        before other threads use the engine.
        """
        if self._lanes is not None and self._compile_kernels:
            self._lanes.prepare()
        self.embed(np.zeros((crops, *CROP_SHAPE), np.uint8))


def check_crops(crops: NDArray[np.uint8]) -> None:
    """Refuses anything that is not `(n, 224, 224, 3) uint8`.

    Raises:
        ValueError: it is something else.
    """
    if crops.dtype != np.uint8 or crops.shape[1:] != CROP_SHAPE:
        raise ValueError(f"crops must be (n, 224, 224, 3) uint8, not {crops.shape} {crops.dtype}")


def resolve_device(device: str) -> str:
    """The device that `auto` stands for, or the one named, if torch sees it.

    Raises:
        ConfigurationError: an unknown name, or a device that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise ConfigurationError(f"device {device!r} is unknown; choose auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no usable GPU or driver"
        raise ConfigurationError(f"device {device!r} is not there: {reason}; use cpu or auto")
    if int(match["index"] or 0) >= (count := torch.cuda.device_count()):
        raise ConfigurationError(f"device {device!r} is not there: the machine has {count}, counted from cuda:0")
    return device
