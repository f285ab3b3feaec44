"""The contrastive objective: real images pulled together, generated ones pulled together, the two pushed apart."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F  # noqa: N812 - torch's own convention

__all__ = ["VIEWS", "ContrastiveLoss", "ViewEmbeddings", "contrastive_loss", "derangement", "gather_rows", "nce"]

_DRAWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewEmbeddings:
    """Embeddings of the eight views of B records, each `(B, d)` floats, in the order of `views.record_views`.

    Raises:
        ValueError: shapes that differ, no record, or no matrix.
    """

    real: Tensor
    real_augmented: Tensor
    real_global: Tensor
    real_local: Tensor
    fake: Tensor
    fake_augmented: Tensor
    fake_global: Tensor
    fake_local: Tensor

    def __post_init__(self) -> None:
        _check_matrix("real", self.real)
        for field in fields(self):
            _check_shape(field.name, getattr(self, field.name), self.real.shape)

    @classmethod
    def of_records(cls, embeddings: Tensor) -> Self:
        """Takes `(B, 8, d)` embeddings apart, the views of a record in the order of the fields.

        Raises:
            ValueError: another shape.
        """
        if embeddings.dim() != 3 or embeddings.shape[1] != len(VIEWS):
            raise ValueError(f"embeddings must be (B, {len(VIEWS)}, d), not {tuple(embeddings.shape)}")
        return cls(**dict(zip(VIEWS, embeddings.unbind(1), strict=True)))


VIEWS: tuple[str, ...] = tuple(field.name for field in fields(ViewEmbeddings))
"""Names of a record's views, in order."""


@dataclass(frozen=True, slots=True)
class ContrastiveLoss:
    """Scalars: `total` is `real + fake` and the one to differentiate."""

    total: Tensor
    real: Tensor
    fake: Tensor


def contrastive_loss(
    views: ViewEmbeddings,
    *,
    permutation_real: Tensor,
    permutation_fake: Tensor,
    temperature: float = 0.1,
    gather: bool = True,
) -> ContrastiveLoss:
    """The loss `L_real + L_fake` of CoDE (arXiv 2407.20337), each the mean of two terms of `nce`.

    `L_real = ½ [nce(real, π(real_augmented), fake_augmented) + nce(real_local, real_global, fake_global)]`, and
    `L_fake` the same with the roles exchanged. The published training step adds `L_real` twice; this is the paper's.

    Under a process group of W processes the batch is the joined one, B·W records in the order of the ranks: negatives
    and permuted positives come from all of them, queries are this process's own B. The mean of W processes' losses is
    the loss of one process with the joined batch, and so is the mean of their gradients, which is what
    DistributedDataParallel takes. Every process must bring equally many records and the same permutations.

    A matrix of similarities is `(B, B·W)`; there are four.

    Args:
        views: This process's embeddings; half precision is computed in float32, whatever autocast says.
        permutation_real: `(B·W,) int64`; record i's positive is record `permutation_real[i]`'s augmented real image.
        permutation_fake: The same for generated images; see `derangement`.
        temperature: What cosines are divided by.
        gather: False for the loss of this process's records alone (W = 1), whatever process group there is.

    Raises:
        ValueError: a permutation of another length, or a temperature that is not positive.
    """
    _check_temperature(temperature)
    batch = len(views.real)
    with torch.autocast(views.real.device.type, enabled=False):
        unit = {name: _unit(getattr(views, name)) for name in VIEWS}
        shared = ("real_augmented", "fake_augmented", "real_global", "fake_global")
        own = torch.stack([unit[name] for name in shared], dim=1)
        # One collective for the four, forward and back.
        real_augmented, fake_augmented, real_global, fake_global = (gather_rows(own) if gather else own).unbind(1)
        first = dist.get_rank() * batch if len(real_augmented) > batch else 0
        rows = slice(first, first + batch)
        real_positives = real_augmented[_own_part(permutation_real, rows, real_augmented)]
        fake_positives = fake_augmented[_own_part(permutation_fake, rows, fake_augmented)]
        real = _unit_nce(unit["real"], real_positives, fake_augmented, temperature).mean() / 2
        real = real + _unit_nce(unit["real_local"], unit["real_global"], fake_global, temperature).mean() / 2
        fake = _unit_nce(unit["fake"], fake_positives, real_augmented, temperature).mean() / 2
        fake = fake + _unit_nce(unit["fake_local"], unit["fake_global"], real_global, temperature).mean() / 2
    return ContrastiveLoss(total=real + fake, real=real, fake=fake)


def nce(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE with explicit negatives that belong to no query in particular (van den Oord et al., arXiv 1807.03748).

    `−log(exp(cos(qᵢ, pᵢ)/τ) / (exp(cos(qᵢ, pᵢ)/τ) + Σⱼ exp(cos(qᵢ, Nⱼ)/τ)))`, one number per query; the mean is the
    caller's.

    Args:
        queries: `(n, d)` floats; half precision is computed in float32.
        positives: `(n, d)`, one per query.
        negatives: `(m, d)`, m ≥ 1, each against every query.
        temperature: τ.

    Returns:
        `(n,)` losses ≥ 0.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    _check_temperature(temperature)
    _check_matrix("queries", queries)
    _check_matrix("negatives", negatives)
    _check_shape("positives", positives, queries.shape)
    _check_shape("negatives", negatives, (len(negatives), queries.shape[1]))
    with torch.autocast(queries.device.type, enabled=False):
        return _unit_nce(_unit(queries), _unit(positives), _unit(negatives), temperature)


def _unit_nce(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    scaled = queries / temperature
    positive = (scaled * positives).sum(dim=1)
    # −log(eᵖ / (eᵖ + Σeⁿ)) as softplus(log Σeⁿ − p): nothing overflows, and a small loss keeps its digits.
    return F.softplus(torch.logsumexp(scaled @ negatives.T, dim=1) - positive)


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation of n elements that leaves none in its place, each such permutation as likely as any other.

    Args:
        n: How many elements; one alone stays where it is.
        generator: Where the randomness comes from; processes that share a batch need equal ones.

    Returns:
        `(n,) int64` on the generator's device.

    Raises:
        ValueError: n under 1.
    """
    if n < 1:
        raise ValueError(f"a permutation needs at least one element, not {n}")
    places = torch.arange(n, device=generator.device)
    # At least every third permutation will do, whatever n: all draws fail once in 10¹¹ times.
    for _ in range(_DRAWS if n > 1 else 0):
        permutation = torch.randperm(n, generator=generator, device=generator.device)
        if not bool((permutation == places).any()):
            return permutation
    return places.roll(1)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of the ranks, with gradient to the process that each came from.

    Args:
        rows: `(B, …)`, of one shape on every process.

    Returns:
        `(B·W, …)`; `rows` itself without a process group or in one of a single process. Backwards every process gets
        the sum of what all of them ask of its rows.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        # Every backend reduces to all; gloo may not scatter.
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.rows
        return total[first : first + ctx.rows]


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)


def _own_part(permutation: Tensor, rows: slice, joined: Tensor) -> Tensor:
    if permutation.shape != (len(joined),):
        raise ValueError(f"a permutation must be ({len(joined)},), the joined batch, not {tuple(permutation.shape)}")
    return permutation[rows].to(joined.device, non_blocking=True)


def _check_matrix(name: str, value: Tensor) -> None:
    if value.dim() != 2 or min(value.shape) < 1:
        raise ValueError(f"{name} must be a matrix with at least one row, not of shape {tuple(value.shape)}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must be of shape {tuple(shape)}, not {tuple(value.shape)}")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
