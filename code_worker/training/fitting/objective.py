"""The contrastive objective and one optimiser step on it: embeddings, loss, gradients, checks, the move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from code_worker.errors import DivergedError
from code_worker.training.fitting.network import average_gradients

if TYPE_CHECKING:
    from code_worker.training.fitting.network import TrainableEncoder, World

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
        views: This process's embeddings; half precision is computed in float32, no matter what autocast says.
        permutation_real: `(B·W,) int64`; record i's positive is record `permutation_real[i]`'s augmented real image.
        permutation_fake: The same for generated images; see `derangement`.
        temperature: What cosines are divided by.
        gather: False for the loss of this process's records alone (W = 1), no matter which process group there is.

    Raises:
        ValueError: a permutation of another length, or a temperature that is not positive.
    """
    _check_temperature(temperature)
    batch = len(views.real)
    with torch.autocast(views.real.device.type, enabled=False):
        # (B, d) each, rows of length 1: a product of two rows is their cosine.
        unit = {name: _unit(getattr(views, name)) for name in VIEWS}
        shared = ("real_augmented", "fake_augmented", "real_global", "fake_global")
        # (B, 4, d): those that the queries of other processes are compared with.
        own = torch.stack([unit[name] for name in shared], dim=1)
        # One collective for the four, forward and back.
        # (B·W, d) each.
        real_augmented, fake_augmented, real_global, fake_global = (gather_rows(own) if gather else own).unbind(1)
        # This process's records within the joined batch.
        first = dist.get_rank() * batch if len(real_augmented) > batch else 0
        rows = slice(first, first + batch)
        # (B, d): each own record against the augmented view of another record of its class, of any process.
        real_positives = real_augmented[_own_part(permutation_real, rows, real_augmented)]
        fake_positives = fake_augmented[_own_part(permutation_fake, rows, fake_augmented)]
        # (B,) losses, then their mean; half of each, so that a class weighs as much as the other.
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
    # Dividing (n, d) is cheaper than dividing the (n, m) cosines.
    scaled = queries / temperature
    # (n, d) · (n, d) → (n,): the cosine of each query with its own positive, over τ.
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
    # At least every third permutation will do, for any n: all draws fail once in 10¹¹ times.
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
        # (W·B, …), in the order of the ranks.
        gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        # Every backend reduces to all; gloo may not scatter.
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.rows
        # Every process has used all rows: what they ask of this process's own is in the sum.
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
        # (records, 8, size, size, 3) → (records · 8, size, size, 3): the views of a record are neighbours.
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
        # From seed and step alone, on the CPU: a run that is taken up again, and every process, draws the same.
        generator = torch.Generator().manual_seed(self._seed * _SEED_STRIDE + step)
        joined = records * self._world.size
        real, fake = derangement(joined, generator), derangement(joined, generator)
        # (records · 8, width) → (records, 8, width)
        views = ViewEmbeddings.of_records(embeddings.view(records, len(VIEWS), -1))
        return contrastive_loss(views, permutation_real=real, permutation_fake=fake).total

    def _at_once(self, views: Tensor, records: int, step: int) -> float:
        loss = self.loss(self.embed(views), records, step)
        self.scaler.scale(loss).backward()
        return float(loss.detach())

    def _in_parts(self, views: Tensor, records: int, step: int) -> float:
        # Cut between views, not records: the objective sees the embeddings of all again.
        parts = views.chunk(self._accumulate)
        with torch.no_grad():
            # (records · 8, width), without a graph: of each part only the embeddings stay.
            embeddings = torch.cat([self.embed(part) for part in parts])
        # A leaf: backward stops here and leaves dL/d(embeddings), which each part then passes on.
        embeddings.requires_grad_()
        loss = self.loss(embeddings, records, step)
        self.scaler.scale(loss).backward()
        assert embeddings.grad is not None  # noqa: S101 - the loss depends on every embedding
        # chunk() may give fewer parts than asked for.
        for part, gradient in zip(parts, torch.split(embeddings.grad, [len(part) for part in parts]), strict=True):
            self.embed(part).backward(gradient)
        return float(loss.detach())

    def _move(self, step: int, value: float) -> None:
        self.scaler.unscale_(self._optimiser)
        parameters = [parameter for parameter in self._encoder.parameters() if parameter.grad is not None]
        # One number for all gradients: it is not finite if any of them is not.
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
        # In a row: a single bad batch is no divergence.
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
