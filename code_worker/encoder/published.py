"""Import of encoders that others wrote: the published form and checkpoints of a timm trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from code_worker.encoder.architecture import VitConfig, expected_shapes
from code_worker.encoder.download import HUB_PREFIX, download
from code_worker.encoder.weights import EncoderWeights, as_tensors, check_fit, read_safetensors, read_torch_pickle
from code_worker.errors import ArtifactError, ConfigurationError

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

    Mean and standard deviation are ImageNet's, not those of the directory's `preprocessor_config.json`: that file
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
    # A `config.json` leaves out what equals the library's defaults.
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
    # Other widths of a head are in newer configurations; the timm model has none of its own.
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
    # The embedding is the CLS token before the pooler.
    found = {name: tensor for name, tensor in found.items() if not name.startswith("pooler.")}
    shapes = expected_shapes(config)
    sources = {name: _published_names(name) for name in shapes}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, parts in sources.items():
        # Query, key and value are three tensors there and one of three times the rows here.
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
    """Returns where the timm tensor comes from; three names are stacked in their order."""
    if not name.startswith("blocks."):
        return _OUTSIDE[name]
    _, block, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return tuple(f"encoder.layer.{block}.{part}.{kind}" for part in _IN_BLOCK[module])


StateName = Literal["state_dict", "state_dict_ema"]


def load_checkpoint(source: str | Path, *, state: StateName = "state_dict") -> EncoderWeights:
    """Reads an encoder, strictly: what cannot be represented exactly is refused, nothing is ever executed.

    Args:
        source: a directory in the published form (`config.json` of a `ViTModel` beside `model.safetensors` or
            its shards, or `pytorch_model.bin`), its hub name `hf:owner/name[@revision]`, or a timm checkpoint
            (`last.pth.tar`, `.pth`, `.pt`) of a `vit_tiny_patch16_224`.
        state: which weights of a training checkpoint. The plain ones are those the trainer measured; averaged
            ones (`state_dict_ema`) are taken only when asked for.

    Raises:
        ConfigurationError: nothing is there, or the hub does not know or does not give it.
        ArtifactError: it is there, but damaged, unsafe (UnsafeArtifactError) or not such an encoder.
    """
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        directory = download(source)
        return _published(directory, f"{source.partition('@')[0]}@{directory.name}")
    path = Path(source).expanduser()
    if path.is_dir():
        return _published(path, str(path))
    if path.is_file():
        return _trained(path, state)
    raise ConfigurationError(
        f"{source}: no such directory or checkpoint file; from the hub it is written {HUB_PREFIX}owner/name"
    )


def _published(directory: Path, source: str) -> EncoderWeights:
    try:
        published = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{source}: no config.json; not a checkpoint in the published form") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{source}: config.json cannot be read: {error}") from error
    try:
        config = config_from_published(published)
        tensors = state_from_published(_published_tensors(directory), config)
    except ArtifactError as error:
        raise type(error)(f"{source}: {error}") from error
    return EncoderWeights(config, tensors, source)


def _published_tensors(directory: Path) -> dict[str, Tensor]:
    if (path := directory / "model.safetensors").is_file():
        return read_safetensors(path)
    if (path := directory / SHARD_INDEX).is_file():
        return _sharded_tensors(path)
    if (path := directory / "pytorch_model.bin").is_file():
        return as_tensors(path, read_torch_pickle(path))
    raise ArtifactError(f"none of model.safetensors, {SHARD_INDEX} and pytorch_model.bin is there")


def _sharded_tensors(index: Path) -> dict[str, Tensor]:
    """Of the shards that the index names, each tensor from the one that it names for it."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(where.values()))
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{index.name} cannot be read: {type(error).__name__}: {error}") from error
    # A plain name of that form cannot lead out of the directory.
    if wrong := [name for name in shards if not (isinstance(name, str) and SHARD.fullmatch(name))]:
        raise ArtifactError(f"{index.name} names {wrong[0]!r}; shards are called model-00001-of-00002.safetensors")
    found = {name: read_safetensors(index.parent / name) for name in shards}
    if absent := sorted(name for name, shard in where.items() if name not in found[shard]):
        raise ArtifactError(f"{absent[0]} is not in {where[absent[0]]}, where {index.name} has it")
    return {name: found[shard][name] for name, shard in where.items()}


def _trained(path: Path, state: StateName) -> EncoderWeights:
    """A timm checkpoint, or a bare state dict; `module.` is what data-parallel training puts before each name."""
    content = read_torch_pickle(path)
    if isinstance(content, dict) and any(name in content for name in ("state_dict", "state_dict_ema")):
        if state not in content:
            raise ArtifactError(
                f"{path}: no {state!r} in this checkpoint; it holds {', '.join(sorted(map(str, content)))}"
            )
        content = content[state]
    elif state != "state_dict":
        raise ArtifactError(f"{path}: a bare state dict, which has no {state!r}")
    tensors = as_tensors(path, content)
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        raise ArtifactError(f"{path}: holds the same name with and without the prefix 'module.'")
    if any(name.startswith("fc_norm.") for name in plain):
        raise ArtifactError(f"{path}: fc_norm.* means average pooling; the embedding is the CLS token's")
    # A classifier stands behind the embedding and does not touch it.
    encoder = {name: tensor for name, tensor in plain.items() if not name.startswith("head.")}
    return EncoderWeights(VitConfig(), encoder, str(path))
