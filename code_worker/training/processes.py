"""Several processes that train as one: what torchrun says of them, and the mean of their gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = ["World", "average_gradients", "broadcast_weights", "join", "lead_decides"]


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process measures, writes and reports."""
        return self.rank == 0


@contextmanager
def join(device: str) -> Iterator[World]:
    """The process group that torchrun's environment describes; a world of one without it.

    NCCL where the device is CUDA, gloo on CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield World()
        return
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()


def broadcast_weights(model: nn.Module, world: World) -> None:
    """Everyone begins with the weights of the first process."""
    if world.size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_gradients(model: nn.Module, world: World) -> None:
    """Gives every process the mean of all gradients, in one message.

    Ours instead of DistributedDataParallel: a step's gradient comes in several backward passes when its records are
    computed in parts, and 22 MB need no overlap with the computation.
    """
    if world.size == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    _scatter(flat, gradients)


def _scatter(flat: Tensor, gradients: list[Tensor]) -> None:
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def lead_decides(wanted: bool, world: World) -> bool:
    """The first process's answer, on every process, so that none waits for another that has left."""
    if world.size == 1:
        return wanted
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    vote = torch.tensor([int(wanted)], device=device)
    dist.broadcast(vote, src=0)
    return bool(vote.item())
