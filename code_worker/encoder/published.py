"""The published form (a transformers `ViTModel`) in the terms of the timm model, exactly or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from code_worker.encoder.vit import VitConfig, expected_shapes
from code_worker.encoder.weights import check_fit
from code_worker.errors import ArtifactError

__all__ = ["SHARD", "SHARD_INDEX", "config_from_published", "state_from_published"]

# What `transformers.ViTConfig` assumes for a field that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
_OUTSIDE = {
    "cls_token": ("embeddings.cls_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj.weight": ("embeddings.patch_embeddings.projection.weight",),
    "patch_embed.proj.bias": ("embeddings.patch_embeddings.projection.bias",),
    "norm.weight": ("layernorm.weight",),
    "norm.bias": ("layernorm.bias",),
}
_IN_BLOCK = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}

_NEWER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<module>.+)\.(?P<kind>weight|bias)")
_RENAMED = {
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
SHARD_INDEX: Final = "model.safetensors.index.json"
SHARD: Final = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def config_from_published(published: object) -> VitConfig:
    """The configuration that `config.json` describes.

    Mean and standard deviation are ImageNet's whatever the directory's `preprocessor_config.json` says: that file
    holds the library's defaults (mean 0.5, a resize), while the method was trained and is published with ImageNet's
    and without a resize.

    Raises:
        ArtifactError: a configuration that the timm model cannot represent exactly.
    """
    if not isinstance(published, dict):
        raise ArtifactError("config.json holds no JSON object")
    if published.get("model_type") != "vit":
        raise ArtifactError(f"config.json: model_type is {published.get('model_type')!r}, not 'vit'")
    for name in ("quantization_config", "pruned_heads"):
        if published.get(name):
            raise ArtifactError(f"config.json: {name} is set; only plain weights can be represented exactly")
    values = {**_DEFAULTS, **{name: published[name] for name in _DEFAULTS if name in published}}
    if values["num_channels"] != 3:
        raise ArtifactError(f"config.json: num_channels is {values['num_channels']!r}; crops have 3")
    config = VitConfig(
        image_size=_square("image_size", values["image_size"]),
        patch_size=_square("patch_size", values["patch_size"]),
        width=values["hidden_size"],
        depth=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        mlp_width=values["intermediate_size"],
        qkv_bias=values["qkv_bias"],
        layer_norm_eps=values["layer_norm_eps"],
        activation=values["hidden_act"],
    )
    if published.get("head_dim") not in (None, config.width // config.heads):
        raise ArtifactError(
            f"config.json: head_dim {published['head_dim']!r} is not hidden_size / num_attention_heads"
        )
    return config


def _square(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise ArtifactError(f"config.json: {name} {value!r} is not square")
    return value[0]


def state_from_published(state: Mapping[str, Tensor], config: VitConfig) -> dict[str, Tensor]:
    """Tensors by timm name; `pooler.*` is left out, a `vit.` prefix is taken off.

    Raises:
        ArtifactError: names (as published) every tensor that is missing, unexpected or of another shape.
    """
    found = {_older_name(name.removeprefix("vit.")): tensor for name, tensor in state.items()}
    if len(found) != len(state):
        raise ArtifactError("weights hold the same tensor twice, with and without the prefix 'vit.' or by two names")
    found = {name: tensor for name, tensor in found.items() if not name.startswith("pooler.")}
    shapes = expected_shapes(config)
    sources = {name: _published_names(name) for name in shapes}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parts in sources.items():
        rows, *others = shapes[name]
        wanted.update(dict.fromkeys(parts, (rows // len(parts), *others)))
    check_fit(found, wanted, "the weights do not fit config.json")
    return {name: torch.cat([found[part] for part in parts]) for name, parts in sources.items()}


def _older_name(name: str) -> str:
    """Before version 5 of transformers modules of a layer had other names."""
    if (match := _NEWER.fullmatch(name)) is None or match["module"] not in _RENAMED:
        return name
    return f"encoder.layer.{match['layer']}.{_RENAMED[match['module']]}.{match['kind']}"


def _published_names(name: str) -> tuple[str, ...]:
    """Where the timm tensor comes from; three names are stacked in their order."""
    if not name.startswith("blocks."):
        return _OUTSIDE[name]
    _, block, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return tuple(f"encoder.layer.{block}.{part}.{kind}" for part in _IN_BLOCK[module])
