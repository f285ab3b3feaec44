"""Import of encoders that others wrote: the published form and checkpoints of a timm trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from torch import Tensor

from code_worker.encoder.hub import HUB_PREFIX, download
from code_worker.encoder.published import SHARD, SHARD_INDEX, config_from_published, state_from_published
from code_worker.encoder.tensor_files import as_tensors, read_safetensors, read_torch_pickle
from code_worker.encoder.vit import VitConfig
from code_worker.encoder.weights import EncoderWeights, random_weights, read_weights, save_weights
from code_worker.errors import ArtifactError, ConfigurationError

__all__ = ["EncoderWeights", "load_checkpoint", "random_weights", "read_weights", "save_weights"]

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
