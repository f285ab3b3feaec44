"""The forward pass that gives the CLS embedding and computes nothing that it does not need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from code_worker.encoder.architecture import Block, VitConfig
from code_worker.types import EMBEDDING_DIM, IMAGE_SIZE


class _Precision:
    """Has float32 multiplied in float32 while any thread wants it so; the setting is one for the whole process.

    TF32 and bfloat16 in its place move embeddings by 1e-3 and more. An application's own products are exact, and
    slower, meanwhile; afterwards its setting holds again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] | None = None

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._restore = _multiply_exactly()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._restore is not None:
                self._restore()
                self._restore = None


def _multiply_exactly() -> Callable[[], None] | None:
    """Sets the precision of products; what puts it back, or None where nothing was changed."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # no types here
    before = [backend.fp32_precision for backend in backends]
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend, to what no name stands for
        named = None
    if named == "highest":
        return None
    torch.set_float32_matmul_precision("highest")

    def restore() -> None:
        if named is not None:
            torch.set_float32_matmul_precision(named)
            return
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

    return restore


_PRECISION: Final = _Precision()


@contextmanager
def exact_arithmetic(device: str) -> Iterator[None]:
    """No autocast, and float32 multiplied in float32, while the block runs.

    Args:
        device: `cpu` or `cuda`: the kind of device that the block computes on.
    """
    _PRECISION.enter()
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _PRECISION.leave()


_Step = Callable[[Tensor], Tensor]


class CropEncoder(nn.Module):
    """`(n, 224, 224, 3) uint8` crops to `(n, 192) float32`: the CLS token after the final LayerNorm.

    An encoder for smaller images takes the centre of the crop; one of a smaller width leaves the last numbers 0,
    which changes neither distances nor what a linear head sees.

    Three shortcuts, all exact but for rounding, and in float32 within `EMBEDDING_TOLERANCE`:
    patches are cut straight out of the bytes and projected by one matrix product, which also keeps TF32
    convolutions out of a CUDA device's fp32; with `fold` the division by 255 and the normalisation are part of that
    matrix (padding is in the bytes already, so no pixel escapes them); the last block computes queries, projection
    and MLP for the CLS token only.

    The patch projection stays in float32 for every `dtype`: folded, its weights are near the smallest normal fp16.
    """

    weight: Tensor
    offsets: Tensor
    first: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, config: VitConfig, state: dict[str, Tensor], *, fold: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self._dtype = dtype
        self.side = config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.margin = (IMAGE_SIZE - config.image_size) // 2
        self._missing = EMBEDDING_DIM - config.width
        self.fold = fold
        # Without values, which the state brings: a process's default type and device decide nothing.
        with torch.device("meta"):
            self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
            self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        others = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
        # Copies: tensors of a file may be the file itself, which somebody could overwrite.
        self.load_state_dict({name: state[name].clone() for name in state if name not in others}, assign=True)
        self.blocks.to(dtype)
        cls_token, positions, projection, bias = (state[name].detach() for name in others)
        weight, bias = _patch_projection(config, projection, bias, fold=fold)
        self.register_buffer("weight", weight)
        self.register_buffer("offsets", positions[0, 1:] + bias)
        self.register_buffer("first", cls_token[0] + positions[0, :1])
        self.register_buffer("mean", _per_value(config.mean, config.patch_size).float())
        self.register_buffer("std", _per_value(config.std, config.patch_size).float())
        self.requires_grad_(requires_grad=False).eval()
        self.use_plain_kernels()

    def forward(self, crops: Tensor) -> Tensor:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`, in the arithmetic that torch comes with."""
        values = crops
        with exact_arithmetic(crops.device.type):
            for step in self._steps:
                values = step(values)
        return values

    def use_plain_kernels(self) -> None:
        """Runs every step as torch has it."""
        self._steps: list[_Step] = [self._tokens, *self.blocks[:-1], self._embeddings]

    def compile_kernels(self) -> None:
        """Lets torch fuse the kernels of every step on its first call with a new batch size.

        Step by step, because equal blocks then share one compilation; the whole would take twelve times as long.
        """
        self._steps = [torch.compile(step, dynamic=False) for step in self._steps]

    def _tokens(self, crops: Tensor) -> Tensor:
        # (n, patches, patch_size² · 3) → (n, patches, width); the offsets are positions and bias together.
        tokens = F.linear(self._patches(crops), self.weight) + self.offsets
        # (n, 1 + patches, width), CLS in front.
        return torch.cat((self.first.expand(len(crops), 1, -1), tokens), dim=1).to(self._dtype)

    def _embeddings(self, tokens: Tensor) -> Tensor:
        # (n, 1 + patches, width) → (n, width): of the last block nothing else is used.
        cls_token = cast("Block", self.blocks[-1]).first(tokens)
        embeddings = cast("Tensor", self.norm(cls_token.float()))
        return F.pad(embeddings, (0, self._missing)) if self._missing else embeddings

    def _patches(self, crops: Tensor) -> Tensor:
        """`(n, patches, patch_size² · 3) float32`, a patch's values in row, column, channel order."""
        side, size, margin = self.side, self.patch_size, self.margin
        if margin:
            crops = crops[:, margin:-margin, margin:-margin]
        # (n, side, size, side, size, 3) → (n, side, side, size, size, 3): patches in rows, then their pixels.
        grid = crops.reshape(-1, side, size, side, size, 3).transpose(2, 3)
        values = grid.reshape(-1, side * side, size * size * 3).to(torch.float32)
        return values if self.fold else (values / 255 - self.mean) / self.std


def _patch_projection(config: VitConfig, projection: Tensor, bias: Tensor, *, fold: bool) -> tuple[Tensor, Tensor]:
    """Weight `(192, patch_size² · 3)` in the order of `_patches`, and bias `(192,)`.

    Folded: `W·((x/255 − mean)/std) + b = (W/(255·std))·x + (b − Σ W·mean/std)`, computed in float64.
    """
    # (width, 3, size, size), timm's order, → (width, size, size, 3), the order of the bytes, → (width, size² · 3).
    weight = projection.permute(0, 2, 3, 1).flatten(1).double()
    bias = bias.double()
    if fold:
        mean, std = (_per_value(channels, config.patch_size) for channels in (config.mean, config.std))
        # In float64, and rounded to float32 once, at the end.
        weight, bias = weight / (255 * std), bias - (weight * (mean / std)).sum(1)
    return weight.float(), bias.float()


def _per_value(channels: tuple[float, float, float], patch_size: int) -> Tensor:
    """`(patch_size² · 3,) float64`, a number per value of a patch in the order of `_patches`."""
    return torch.tensor(channels, dtype=torch.float64, device="cpu").repeat(patch_size**2)
