"""Encoder weights in the project's own form: checked once, stored as safetensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from code_worker.encoder.tensor_files import read_safetensors
from code_worker.encoder.vit import VitConfig, expected_shapes
from code_worker.errors import ArtifactError

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "EncoderWeights",
    "check_fit",
    "random_weights",
    "read_weights",
    "save_weights",
]

WEIGHTS_FILE = "encoder/model.safetensors"
CONFIG_FILE = "encoder/config.json"
# Halves widen to float32 without loss; anything else would not be what was published.
_EXACT_IN_FLOAT32 = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True, eq=False)
class EncoderWeights:
    """An encoder that is complete: every tensor the configuration needs, none besides, all finite.

    Attributes:
        config: the architecture.
        state: float32 tensor by timm name.
        source: where it came from, for people.

    Raises:
        ArtifactError: names what is missing, unexpected, of another shape or type, or not finite.
    """

    config: VitConfig
    state: dict[str, Tensor]
    source: str

    def __post_init__(self) -> None:
        check_fit(self.state, expected_shapes(self.config), f"{self.source}: the weights do not fit the encoder")
        for name, tensor in self.state.items():
            if tensor.dtype not in _EXACT_IN_FLOAT32:
                raise ArtifactError(f"{self.source}: {name} is {tensor.dtype}, which float32 cannot hold exactly")
            if not torch.isfinite(tensor).all():
                raise ArtifactError(f"{self.source}: {name} holds a value that is not finite")
        plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in self.state.items()}
        object.__setattr__(self, "state", plain)


def check_fit(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compares names and shapes of tensors with those expected.

    Raises:
        ArtifactError: `what`, and every tensor that is missing, unexpected or of another shape (eight are spelt out).
    """
    problems = [f"missing {name}" for name in shapes if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in shapes]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ArtifactError(f"{what}: {'; '.join(problems[:8])}{more}")


def save_weights(weights: EncoderWeights, directory: Path) -> None:
    """Writes `encoder/model.safetensors` and `encoder/config.json` below `directory`.

    The same weights give the same bytes, so that a release's hash speaks of the weights and not of the day.
    """
    path = directory / WEIGHTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({name: weights.state[name] for name in sorted(weights.state)}))
    (directory / CONFIG_FILE).write_text(weights.config.to_json(), encoding="utf-8")


def read_weights(directory: Path) -> EncoderWeights:
    """Reads what `save_weights` wrote.

    Raises:
        ArtifactError: a file that is missing, damaged or does not fit the other.
    """
    try:
        text = (directory / CONFIG_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{directory / CONFIG_FILE}: cannot be read: {error}") from error
    return EncoderWeights(VitConfig.from_json(text), read_safetensors(directory / WEIGHTS_FILE), str(directory))


def random_weights(seed: int, *, depth: int = 12) -> EncoderWeights:
    """An UNTRAINED encoder, for toy releases and tests: its embeddings tell images apart, but mean nothing.

    The same seed gives the same bits on every machine: uniform numbers need no function that a processor may round
    differently. They are large enough that the CLS token sees the image, which usual initialisations are not.
    """
    rng = np.random.default_rng(seed)
    config = replace(VitConfig(), depth=depth)
    state = {}
    for name, shape in expected_shapes(config).items():
        values = (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(0.18)
        is_scale = "norm" in name and name.endswith("weight")
        state[name] = torch.from_numpy(values + np.float32(1) if is_scale else values)
    return EncoderWeights(config, state, f"untrained, seed {seed}")
