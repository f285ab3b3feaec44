"""One of two processes that compute the objective together: `python -m tests.training.joined RANK DIRECTORY`."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from code_worker.training.fitting.objective import VIEWS, ViewEmbeddings, contrastive_loss, derangement, gather_rows

JOINED_CASES = [(1, 0.1), (5, 0.1), (7, 0.5)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def records(batch: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """`(batch, 8, width)` embeddings with a common part, as an encoder's are."""
    generator = seeded(seed)
    common = torch.randn(width, generator=generator, dtype=dtype)
    return common + torch.randn(batch, len(VIEWS), width, generator=generator, dtype=dtype)


def step(
    batch: int, temperature: float, part: slice | None = None, *, parallel: bool = False, gather: bool = True
) -> tuple[nn.Module, Tensor]:
    """An encoder gone forward and back once, over the joined 2 × batch records or a part of them, and its loss."""
    inputs = records(2 * batch, 6, seed=batch)[part or slice(None)]
    torch.manual_seed(1)
    encoder: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    encoder = DistributedDataParallel(encoder) if parallel else encoder
    generator = seeded(batch)
    joined = 2 * batch if gather else len(inputs)
    loss = contrastive_loss(
        ViewEmbeddings.of_records(encoder(inputs)),
        permutation_real=derangement(joined, generator),
        permutation_fake=derangement(joined, generator),
        temperature=temperature,
        gather=gather,
    ).total
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return encoder, loss.detach()


def run_process(rank: int, directory: str) -> None:
    """One of two processes: writes averaged losses and gradients for the test to compare."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    results: dict[str, Tensor] = {"rows": gather_rows(torch.full((2, 1), float(rank)))}
    for batch, temperature in JOINED_CASES:
        encoder, loss = step(batch, temperature, slice(rank * batch, (rank + 1) * batch), parallel=True)
        dist.all_reduce(loss)
        results[f"loss {batch}"] = loss / 2
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None
            results[f"{name.removeprefix('module.')} {batch}"] = parameter.grad
    results["alone"] = step(5, 0.1, slice(rank * 5, rank * 5 + 5), gather=False)[1]
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_process(int(sys.argv[1]), sys.argv[2])
