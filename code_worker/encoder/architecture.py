"""The encoder's architecture: its numbers, its layers, and the names and shapes of its weights as timm has them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from code_worker.errors import ArtifactError
from code_worker.types import EMBEDDING_DIM, IMAGE_SIZE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TIMM_LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    """A plain ViT with a CLS token, learned positions and pre-norm blocks; the defaults are ViT-Tiny/16.

    A smaller `image_size` sees the centre of the 224×224 crop, a smaller `width` fills the embedding up with zeros.

    Raises:
        ArtifactError: sizes that do not fit each other or this project (224×224 crops, 192 numbers per image),
            or an activation other than the exact GELU.
    """

    image_size: int = IMAGE_SIZE
    patch_size: int = 16
    width: int = EMBEDDING_DIM
    depth: int = 12
    heads: int = 3
    mlp_width: int = 768
    qkv_bias: bool = True
    layer_norm_eps: float = TIMM_LAYER_NORM_EPS
    activation: str = "gelu"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "heads", "mlp_width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ArtifactError(f"encoder config: {name} must be a positive whole number, not {value!r}")
        # An even difference: the centre of the crop is then the centre of the image, however sides are rounded.
        if self.image_size > IMAGE_SIZE or self.image_size % 2:
            raise ArtifactError(
                f"encoder config: image_size is {self.image_size}; it must be even and at most {IMAGE_SIZE}"
            )
        if self.width > EMBEDDING_DIM:
            raise ArtifactError(f"encoder config: width is {self.width}; heads take {EMBEDDING_DIM} numbers")
        if self.image_size % self.patch_size:
            raise ArtifactError(f"encoder config: patch_size {self.patch_size} does not divide {self.image_size}")
        if self.width % self.heads:
            raise ArtifactError(f"encoder config: {self.heads} heads do not divide the width {self.width}")
        if self.activation != "gelu":
            raise ArtifactError(f"encoder config: activation {self.activation!r} is not the exact 'gelu'")
        if type(self.qkv_bias) is not bool:
            raise ArtifactError(f"encoder config: qkv_bias must be true or false, not {self.qkv_bias!r}")
        if not (_is_number(self.layer_norm_eps) and 0 < self.layer_norm_eps < 1):
            raise ArtifactError(f"encoder config: layer_norm_eps {self.layer_norm_eps!r} is not between 0 and 1")
        _check_channels("mean", self.mean, least=-math.inf)
        _check_channels("std", self.std, least=0.0)

    @property
    def patches(self) -> int:
        """Returns how many patches a crop is cut into."""
        return (self.image_size // self.patch_size) ** 2

    def to_json(self) -> str:
        """The same text for the same configuration, on every machine."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ArtifactError: no JSON object, a field that is missing or unknown, or a value that is not allowed.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"encoder config is not JSON: {error}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            found = set(values) if isinstance(values, dict) else set()
            missing, unknown = ", ".join(sorted(names - found)), ", ".join(sorted(found - names))
            raise ArtifactError(f"encoder config: missing: {missing or 'nothing'}; unknown: {unknown or 'nothing'}")
        return cls(**{name: _tupled(value) for name, value in values.items()})


def _tupled(value: object) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_channels(name: str, values: object, *, least: float) -> None:
    if not (isinstance(values, tuple) and len(values) == 3 and all(_is_number(v) and v > least for v in values)):
        raise ArtifactError(f"encoder config: {name} must be three numbers above {least}, not {values!r}")


def expected_shapes(config: VitConfig) -> dict[str, tuple[int, ...]]:
    """Shape by timm name of every tensor that the configuration needs, in timm's order."""
    width, patch = config.width, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, config.patches + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for number in range(config.depth):
        for name, outputs, inputs, has_bias in _block_layers(config):
            shapes[f"blocks.{number}.{name}.weight"] = (outputs, inputs) if inputs else (outputs,)
            if has_bias:
                shapes[f"blocks.{number}.{name}.bias"] = (outputs,)
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def _block_layers(config: VitConfig) -> list[tuple[str, int, int, bool]]:
    """Name, outputs, inputs (0: a LayerNorm) and whether there is a bias, for each layer of a block."""
    width, hidden = config.width, config.mlp_width
    return [
        ("norm1", width, 0, True),
        ("attn.qkv", 3 * width, width, config.qkv_bias),
        ("attn.proj", width, width, True),
        ("norm2", width, 0, True),
        ("mlp.fc1", hidden, width, True),
        ("mlp.fc2", width, hidden, True),
    ]


class Attention(nn.Module):
    """Multi-head self-attention: `(n, tokens, width)` to the same shape."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Every token looks at every token."""
        n, count, width = tokens.shape
        # Queries, keys and values side by side, each then (n, heads, tokens, numbers of a head).
        parts = self.qkv(tokens).reshape(n, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # (n, heads, tokens, width / heads) each.
        query, key, value = parts.unbind(0)
        # (n, heads, tokens, width / heads) → (n, tokens, heads, width / heads) → (n, tokens, width).
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(n, count, width)
        return cast("Tensor", self.proj(mixed))

    def of_first(self, tokens: Tensor) -> Tensor:
        """The same for the first token alone: `(n, tokens, width)` to `(n, width)`."""
        n, count, width = tokens.shape
        heads, weight, bias = self.num_heads, self.qkv.weight, cast("Tensor | None", self.qkv.bias)
        # The first third of the rows makes queries: (n, 1, width) of the first token only.
        query = F.linear(tokens[:, :1], weight[:width], None if bias is None else bias[:width])
        # The others make keys and values, of all tokens: (n, tokens, 2 · width).
        key_value = F.linear(tokens, weight[width:], None if bias is None else bias[width:])
        key, value = key_value.reshape(n, count, 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        # (n, heads, 1, width / heads).
        query = query.reshape(n, 1, heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value).reshape(n, width)
        return cast("Tensor", self.proj(mixed))


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(…, width)` to the same shape."""
        return cast("Tensor", self.fc2(F.gelu(self.fc1(tokens))))


class Block(nn.Module):
    """A pre-norm block (Dosovitskiy et al., arXiv 2010.11929): attention, then MLP, each added to what came in."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(n, tokens, width)` to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return cast("Tensor", tokens + self.mlp(self.norm2(tokens)))

    def first(self, tokens: Tensor) -> Tensor:
        """The block's output for the first token alone, `(n, width)`, from all `(n, tokens, width)` inputs."""
        # All tokens are normalised, for each is a key and a value; one is added to.
        token = tokens[:, 0] + self.attn.of_first(self.norm1(tokens))
        return cast("Tensor", token + self.mlp(self.norm2(token)))


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: `(n, 3, size, size)` to `(n, patches, width)`."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patches row by row."""
        # (n, width, side, side) → (n, width, patches) → (n, patches, width).
        return cast("Tensor", self.proj(pixels)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The whole network as it is trained; its state is the one that timm's class of this name has.

    Its weights are to be loaded: what it begins with is not what timm would draw.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """`(n, 3, size, size)` to `(n, width)`: the CLS token after the final LayerNorm."""
        # (n, patches, width).
        patches = self.patch_embed(pixels)
        # (n, 1 + patches, width).
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed
        return cast("Tensor", self.norm(self.blocks(tokens))[:, 0])
