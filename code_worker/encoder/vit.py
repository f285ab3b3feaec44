"""The encoder's architecture as a value, and the names and shapes of its weights as timm has them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from code_worker.errors import ArtifactError
from code_worker.types import EMBEDDING_DIM, IMAGE_SIZE

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "TIMM_LAYER_NORM_EPS", "VitConfig", "expected_shapes"]

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
        """How many patches a crop is cut into."""
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
