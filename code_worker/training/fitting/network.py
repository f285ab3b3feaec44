"""The encoder as it is trained, and how its weights move: optimiser, average, interpolation, several processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from code_worker.encoder.architecture import VisionTransformer, VitConfig
from code_worker.encoder.weights import EncoderWeights
from code_worker.system.libraries import silent_import

if TYPE_CHECKING:
    from collections.abc import Sequence

    from code_worker.training.fitting.job import Scale

_LUMA = (0.299, 0.587, 0.114)
_BLUE = (-0.169, -0.331, 0.5)
_RED = (0.5, -0.419, -0.081)
# Photographs have amplitudes of about 1/f, noise and traces do not fall: these gains bring both to one size.
_GAIN, _SLOPE, _MOST = 0.1, 1.8, 8.0


def build_vit(config: VitConfig) -> nn.Module:
    """The timm model of a configuration, freshly initialised, without classifier, in evaluation mode."""
    with silent_import():  # of the hub's client
        from timm.models.vision_transformer import VisionTransformer  # takes longer than torch itself

    model: nn.Module = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        # timm multiplies and truncates; the half keeps the product from falling below the whole number.
        mlp_ratio=(config.mlp_width + 0.5) / config.width,
        qkv_bias=config.qkv_bias,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        act_layer=nn.GELU,
    )
    return model.eval()


class TrainableEncoder(nn.Module):
    """`(n, size, size, 3) uint8` views to `(n, width)` embeddings: the network behind the published normalisation.

    The same numbers as `encoder.forward.CropEncoder` gives for the same pixels, but for rounding.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = VisionTransformer(config)
        self.register_buffer("mean", 255 * torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def fresh(cls, config: VitConfig, *, seed: int, start: Literal["timm", "cosine"] = "timm") -> TrainableEncoder:
        """Weights drawn by timm's initialisation under a seed; `cosine` replaces those of the patch projection.

        Raises:
            ValueError: a cosine start for more channels than a patch has numbers.
        """
        with torch.random.fork_rng(devices=[]):
            encoder = cls(config)
            # In a fork of the generator, so that drawing weights changes no other random choice of the run.
            torch.manual_seed(seed)
            encoder.vit.load_state_dict(build_vit(config).state_dict())
        if start == "cosine":
            with torch.no_grad():
                encoder.vit.patch_embed.proj.weight.copy_(cosine_projection(config.width, config.patch_size))
        return encoder

    @classmethod
    def of(cls, weights: EncoderWeights) -> TrainableEncoder:
        """The encoder of a release, to train it further."""
        with torch.random.fork_rng(devices=[]):
            encoder = cls(weights.config)
        encoder.vit.load_state_dict(weights.state)
        return encoder

    def mixed_with(self, weights: EncoderWeights, share: float) -> Self:
        """Moves the weights towards those of a release: all the way at 1, not at all at 0; returns itself.

        In between it is the warm start of Ash & Adams (arXiv 1910.08475): weights that were trained to the end have
        forgotten how to see what they had no use for, and a share of fresh ones brings that back.
        """
        with torch.no_grad():
            for name, tensor in self.vit.state_dict().items():
                tensor.lerp_(weights.state[name], share)
        return self

    def forward(self, views: Tensor) -> Tensor:
        """`(n, size, size, 3) uint8` to `(n, width)`: the CLS token after the final LayerNorm, not normalised."""
        # (n, size, size, 3) uint8 → (n, 3, size, size) floats of mean 0 and deviation 1.
        pixels = (views.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        return cast("Tensor", self.vit(pixels))

    def weights(self, source: str) -> EncoderWeights:
        """The present weights as an encoder that a release can hold.

        Raises:
            ArtifactError: a weight that is not finite.
        """
        return EncoderWeights(self.config, {name: t.clone() for name, t in self.vit.state_dict().items()}, source)


def cosine_projection(width: int, patch_size: int) -> Tensor:
    """`(width, 3, patch, patch)`: the cosine transform of a patch, whitened by the spectrum of photographs.

    All frequencies of brightness come first, then those of the two colour differences, low ones first. A convolution
    that begins so hands the blocks features of one size, traces of upsampling and quantisation among them; drawn at
    random it spends a thousand steps on finding them (docs/training.md has the comparison).

    Raises:
        ValueError: more channels than a patch has numbers.
    """
    if width > 3 * patch_size**2:
        raise ValueError(f"a patch of {patch_size}×{patch_size} has {3 * patch_size**2} numbers, fewer than {width}")
    # Rows are frequencies, columns positions: (patch, patch).
    waves = _cosines(patch_size)
    order = sorted(((row, column) for row in range(patch_size) for column in range(patch_size)), key=_radius)
    rows = [_filter(_LUMA, waves, place) for place in order]
    for place in order:
        # Doubled: colour differences of photographs are smaller than their differences in brightness.
        rows += [2 * _filter(colour, waves, place) for colour in (_BLUE, _RED)]
    return torch.stack(rows[:width]).float()


def _radius(place: tuple[int, int]) -> float:
    return math.hypot(*place)


def _cosines(size: int) -> Tensor:
    """`(size, size)` orthonormal DCT-II, a row per frequency."""
    # float64: float32 leaves the rows orthogonal to a few digits only.
    positions = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi * (2 * positions[None] + 1) * positions[:, None] / (2 * size)) * math.sqrt(2 / size)
    # The constant row has twice the energy of a cosine; halved, all rows are of length 1.
    waves[0] /= math.sqrt(2)
    return waves


def _filter(colour: Sequence[float], waves: Tensor, place: tuple[int, int]) -> Tensor:
    weights = torch.tensor(colour, dtype=torch.float64)
    gain = min(_MOST, _GAIN * (1 + _radius(place)) ** _SLOPE)
    # One wave down times one across: (patch, patch).
    plane = torch.outer(waves[place[0]], waves[place[1]])
    # (3, 1, 1) · (patch, patch) → (3, patch, patch)
    return cast("Tensor", gain * (weights / weights.norm())[:, None, None] * plane)


WARMUP_FROM = 1e-6


def make_optimiser(model: nn.Module, *, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW, its rate yet to be set; as in timm's recipes vectors (biases, norms) and the tokens are not decayed."""
    # timm's function for these groups would cost a refit from a champion the seconds that timm takes to import.
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
    # At least one step is left for the cosine: a run shorter than its warm-up would end at the peak.
    # A function of the step and no scheduler of torch's: there is no state that a resumed run could lack.
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
        # Begins with the weights at the start; torch's AveragedModel forgets them at its first update.
        self.state: dict[str, Tensor] = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the present weights by one step."""
        for name, tensor in model.state_dict().items():
            # In place: no second copy of all weights at each step.
            self.state[name].lerp_(tensor.to(self.state[name].dtype), 1 - self._decay)


SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the trained weights that are tried; 0 is the champion's encoder, the measure of what is forgotten."""
_FEWEST: Final = 10


def interpolate_weights(
    champion: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """`(1 − share) · champion + share · trained`, tensor by tensor; the ends are exactly theirs."""
    # (1 - 1) · champion + trained rounds; share 1 must be the trained weights bit for bit.
    if share in {0.0, 1.0}:
        return dict(trained if share else champion)
    return {name: champion[name].to(tensor).lerp(tensor, share) for name, tensor in trained.items()}


def choose_share(
    confidence: Mapping[float, Mapping[str, float]], images: Mapping[str, int], *, max_forgetting: float
) -> float:
    """The share of the trained weights that tells best, on average over groups, and forgets little of any.

    Heads are fitted anew for every share. A group that is too small to say anything is not asked.

    Args:
        confidence: share → group (`real`, `fake`, generators) → mean probability of what is right; with share 0.
        images: how many of the validation part each group has.
        max_forgetting: what a group may lose against share 0.

    Returns:
        A share above 0; where all of those forget more, the one that forgets least.
    """
    before = confidence[0.0]
    asked = [group for group in before if images.get(group, _FEWEST) >= _FEWEST]
    # Worst group, not the mean: a generator that is forgotten is not made up for by others.
    lost = {
        share: max(before[group] - after[group] for group in asked)
        for share, after in confidence.items()
        if share > 0
    }
    allowed = [share for share, worst in lost.items() if worst <= max_forgetting]
    if not allowed:
        return min(lost, key=lambda share: lost[share])
    return max(allowed, key=lambda share: sum(confidence[share][group] for group in asked))


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """True if this process measures, writes and reports."""
        return self.rank == 0


@contextmanager
def join_processes(device: str) -> Iterator[World]:
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
    # One message: each has a latency that some 150 small ones would add up.
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    # Every process must come here at every step with the same parameters, or all wait for ever.
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
