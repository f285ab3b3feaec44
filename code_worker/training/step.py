"""One optimiser step: views to embeddings, the objective, gradients over all processes, checks, the move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from code_worker.errors import DivergedError
from code_worker.training.objective import VIEWS, ViewEmbeddings, contrastive_loss, derangement
from code_worker.training.processes import average_gradients

if TYPE_CHECKING:
    from code_worker.training.network import TrainableEncoder
    from code_worker.training.processes import World

__all__ = ["DivergenceWatch", "Stepper", "chance_loss", "resolve_precision"]

_AUTOCAST: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SEED_STRIDE: Final = 1_000_003


def resolve_precision(precision: str, device: str) -> str:
    """`auto` is bf16 on CUDA, where it halves the time, and fp32 on a CPU, where it gains nothing."""
    if precision != "auto":
        return precision
    return "bf16" if device.startswith("cuda") else "fp32"


def chance_loss(records: int) -> float:
    """The objective of embeddings that are all the same: `2 · log(1 + records)`, two terms of one positive each."""
    return 2 * math.log1p(records)


class Stepper:
    """Computes losses and gradients and moves the weights; holds no data.

    With `accumulate` over 1 the records of a step are embedded in parts, first without gradient; the objective is
    then differentiated with respect to the embeddings of all, and each part is embedded again to pass its share on
    (Gao et al., arXiv 2101.06983). Loss and gradient are those of the whole batch, negatives included; memory is that
    of a part.
    """

    def __init__(
        self,
        encoder: TrainableEncoder,
        optimiser: torch.optim.Optimizer,
        world: World,
        *,
        seed: int,
        accumulate: int = 1,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        self._encoder = encoder
        self._embed: Callable[[Tensor], Tensor] = torch.compile(encoder) if compiled else encoder
        self._optimiser = optimiser
        self._world = world
        self._seed = seed
        self._accumulate = accumulate
        self._dtype = _AUTOCAST.get(precision)
        self._device = encoder.mean.device
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "fp16")

    def __call__(self, batch: Tensor, step: int) -> float:
        """Moves the weights by one step over `(records, 8, size, size, 3) uint8`; returns this process's loss.

        Raises:
            DivergedError: a loss or gradient that is not finite; the weights are as before.
        """
        self._optimiser.zero_grad(set_to_none=True)
        views = batch.to(self._device, non_blocking=True).flatten(0, 1)
        back = self._in_parts if self._accumulate > 1 else self._at_once
        value = back(views, len(batch), step)
        average_gradients(self._encoder, self._world)
        self._move(step, value)
        return value

    def embed(self, views: Tensor) -> Tensor:
        """`(n, size, size, 3) uint8` to `(n, width) float32`, in the precision of the steps."""
        if self._dtype is None:
            return self._embed(views)
        with torch.autocast(self._device.type, dtype=self._dtype):
            embeddings = self._embed(views)
        return embeddings.float()

    def loss(self, embeddings: Tensor, records: int, step: int) -> Tensor:
        """The objective of `(records · 8, width)` embeddings, with the permutations of this step."""
        generator = torch.Generator().manual_seed(self._seed * _SEED_STRIDE + step)
        joined = records * self._world.size
        real, fake = derangement(joined, generator), derangement(joined, generator)
        views = ViewEmbeddings.of_records(embeddings.view(records, len(VIEWS), -1))
        return contrastive_loss(views, permutation_real=real, permutation_fake=fake).total

    def _at_once(self, views: Tensor, records: int, step: int) -> float:
        loss = self.loss(self.embed(views), records, step)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return float(loss.detach())

    def _in_parts(self, views: Tensor, records: int, step: int) -> float:
        parts = views.chunk(self._accumulate)
        with torch.no_grad():
            embeddings = torch.cat([self.embed(part) for part in parts])
        embeddings.requires_grad_()
        loss = self.loss(embeddings, records, step)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # as above
        assert embeddings.grad is not None  # noqa: S101 - the loss depends on every embedding
        # chunk() may give fewer parts than asked for.
        for part, gradient in zip(parts, torch.split(embeddings.grad, [len(part) for part in parts]), strict=True):
            self.embed(part).backward(gradient)  # type: ignore[no-untyped-call]  # as above
        return float(loss.detach())

    def _move(self, step: int, value: float) -> None:
        self.scaler.unscale_(self._optimiser)
        parameters = [parameter for parameter in self._encoder.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value}", step)
        # Under fp16 an overflow is the scaler's business: it skips the step and scales less.
        if not self.scaler.is_enabled() and not bool(torch.isfinite(norm)):
            raise DivergedError("the gradient is not finite", step)
        self.scaler.step(self._optimiser)
        self.scaler.update()


class DivergenceWatch:
    """Notices a loss that rises above what embeddings without any information would have."""

    _SMOOTHING = 0.98
    _MARGIN = 1.2
    _PATIENCE = 100

    def __init__(self, chance: float) -> None:
        self._limit = self._MARGIN * chance
        self._above = 0
        self.smooth: float | None = None

    def see(self, value: float, step: int) -> None:
        """Takes a step's loss.

        Raises:
            DivergedError: the smoothed loss was above the limit for a hundred steps.
        """
        self.smooth = value if self.smooth is None else self._SMOOTHING * self.smooth + (1 - self._SMOOTHING) * value
        self._above = self._above + 1 if self.smooth > self._limit else 0
        if self._above >= self._PATIENCE:
            raise DivergedError(
                f"the loss has been above {self._limit:.2f}, worse than embeddings that tell nothing apart, for "
                f"{self._PATIENCE} steps",
                step,
            )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"smooth": self.smooth, "above": self._above}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.smooth, self._above = state["smooth"], state["above"]
