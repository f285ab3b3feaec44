"""The encoder on a device: uint8 crops in, float32 embeddings out."""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import NDArray

from code_worker.encoder.forward import CropEncoder
from code_worker.encoder.lanes import Lanes
from code_worker.encoder.weights import EncoderWeights
from code_worker.errors import ConfigurationError
from code_worker.types import EMBEDDING_DIM, IMAGE_SIZE

__all__ = ["CROP_SHAPE", "CUDA_BATCH", "Engine", "check_crops", "resolve_device"]

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
        self._lanes: Lanes | None = None
        if self.device != "cpu":
            self._lanes = Lanes(self._encoder, self.device, lanes=lanes, largest_batch=largest_batch)

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
        """`plain`, `compiled`, `recorded` or `compiled and recorded`; see `Lanes`."""
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
    """Refuses whatever is not `(n, 224, 224, 3) uint8`.

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
