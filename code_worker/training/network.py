"""The encoder as it is trained: uint8 views in, CLS embeddings out, gradients all the way."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal, Self, cast

import torch
from torch import Tensor, nn

from code_worker.encoder.blocks import VisionTransformer
from code_worker.encoder.vit import VitConfig
from code_worker.encoder.weights import EncoderWeights
from code_worker.telemetry import silent_import

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TrainableEncoder", "build_vit", "cosine_projection"]

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
    waves = _cosines(patch_size)
    order = sorted(((row, column) for row in range(patch_size) for column in range(patch_size)), key=_radius)
    rows = [_filter(_LUMA, waves, place) for place in order]
    for place in order:
        rows += [2 * _filter(colour, waves, place) for colour in (_BLUE, _RED)]
    return torch.stack(rows[:width]).float()


def _radius(place: tuple[int, int]) -> float:
    return math.hypot(*place)


def _cosines(size: int) -> Tensor:
    """`(size, size)` orthonormal DCT-II, a row per frequency."""
    positions = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi * (2 * positions[None] + 1) * positions[:, None] / (2 * size)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves


def _filter(colour: Sequence[float], waves: Tensor, place: tuple[int, int]) -> Tensor:
    weights = torch.tensor(colour, dtype=torch.float64)
    gain = min(_MOST, _GAIN * (1 + _radius(place)) ** _SLOPE)
    plane = torch.outer(waves[place[0]], waves[place[1]])
    return cast("Tensor", gain * (weights / weights.norm())[:, None, None] * plane)
