"""Encoder weights in the project's own form, read without ever running what is in a file."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from code_worker.encoder.architecture import VitConfig, expected_shapes
from code_worker.errors import ArtifactError, UnsafeArtifactError
from code_worker.system.files import is_lfs_pointer

_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
# What the restricted unpickler and the archive reader raise for bytes that are no checkpoint.
_DAMAGE = (
    RuntimeError,
    LookupError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
)

# Trainers store their metric as a numpy scalar: a plain number, in a pickle that names numpy's old or new module.
_SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]  # noqa: SLF001 - numpy has no public name for it
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        ArtifactError: a file that is missing, damaged or of another form.
    """
    _refuse_lfs_pointer(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors: {error}") from error


def read_torch_pickle(path: Path) -> Any:
    """Reads what `torch.save` wrote, by torch's restricted unpickler: tensors, numbers, `argparse.Namespace`.

    Raises:
        UnsafeArtifactError: the pickle asks for anything else, which the text names; nothing of it was executed.
        ArtifactError: a file that is missing, damaged or of another form.
    """
    _refuse_lfs_pointer(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol torch may not read: it reads or raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise ArtifactError(f"{path}: damaged, or not written by torch.save ({type(error).__name__})") from error


def _refuse_lfs_pointer(path: Path) -> None:
    if is_lfs_pointer(path):
        raise ArtifactError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository")


def _refusal(path: Path, error: pickle.UnpicklingError) -> ArtifactError:
    match = _REFUSED_GLOBAL.search(str(error))
    asked_for = [match[1]] if match else _globals_of_bare_pickle(path)
    if not asked_for:
        return ArtifactError(f"{path}: damaged, or not written by torch.save")
    return UnsafeArtifactError(
        f"{path}: the pickle asks for {', '.join(asked_for)}, which no weights need; nothing was executed. "
        "If you trust its origin, save the bare state dict again where it was made, and import that"
    )


def _globals_of_bare_pickle(path: Path) -> list[str]:
    """Names that a file of the plain `pickle` module would import, read without running it."""
    names: list[str] = []
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if opcode.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except _DAMAGE:
        pass  # the names met before the damage still say what the file wanted
    return names


def as_tensors(path: Path, state: object) -> dict[str, Tensor]:
    """`state` itself when it is a dictionary of named tensors.

    Raises:
        ArtifactError: anything else.
    """
    if not isinstance(state, dict) or not state:
        raise ArtifactError(f"{path}: no dictionary of tensors")
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor)):
            raise ArtifactError(f"{path}: entry {name!r} is no tensor but {type(tensor).__name__}")
    return state


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
