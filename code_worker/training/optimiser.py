"""How weights move: AdamW without decay on biases, warm-up and cosine, an average on the side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from code_worker.training.job import Scale

__all__ = ["WARMUP_FROM", "WeightAverage", "learning_rate", "make_optimiser", "set_learning_rate"]

WARMUP_FROM = 1e-6


def make_optimiser(model: nn.Module, *, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW, its rate yet to be set; as in timm's recipes vectors (biases, norms) and the tokens are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim < 2 or name.endswith(("cls_token", "pos_embed")) else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=WARMUP_FROM, fused=fused or None)


def learning_rate(step: int, peak: float, *, warmup_epochs: float, scale: Scale) -> float:
    """Rate of a step (from 0): linear from 1e-6 over the warm-up, then half a cosine down to 0 at the last step."""
    warmup = min(round(warmup_epochs * scale.steps_per_epoch), scale.steps - 1)
    if step < warmup:
        return WARMUP_FROM + (peak - WARMUP_FROM) * step / warmup
    done = (step - warmup) / max(1, scale.steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group of the optimiser this rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


class WeightAverage:
    """Exponential moving average of a model's parameters (Polyak); the model itself stays as it is."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.state: dict[str, Tensor] = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the present weights by one step."""
        for name, tensor in model.state_dict().items():
            self.state[name].lerp_(tensor.to(self.state[name].dtype), 1 - self._decay)
