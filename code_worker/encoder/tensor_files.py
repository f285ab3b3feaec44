"""Reading tensors from files without ever running what is in them."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from code_worker.disk import is_lfs_pointer
from code_worker.errors import ArtifactError, UnsafeArtifactError

__all__ = ["as_tensors", "read_safetensors", "read_torch_pickle"]

_ASKED_FOR = re.compile(r"GLOBAL ([\w.]+)")
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
    """Whatever `torch.save` wrote, by torch's restricted unpickler: tensors, numbers, `argparse.Namespace`.

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
    match = _ASKED_FOR.search(str(error))
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
