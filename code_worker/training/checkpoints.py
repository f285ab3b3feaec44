"""Checkpoints of a training: written whole or not at all, read without unpickling anything but tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import torch

from code_worker.disk import whole_file
from code_worker.errors import TrainingError
from code_worker.logs import get_logger

__all__ = ["read_checkpoint", "resume_state", "write_checkpoint"]

log = get_logger(__name__)
_NAME: Final = re.compile(r"step-(\d{9})\.pt")
_KEPT: Final = 2


def write_checkpoint(directory: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state` (tensors, numbers, text, lists and dicts of them) and drops all but the two newest.

    Written beside its place, flushed to the disk and renamed: a reader sees the one before or this one.

    Raises:
        TrainingError: the disk is full or cannot be written; the checkpoints before stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:09}.pt"
    try:
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch's archive writer turns a full disk into a RuntimeError.
        raise TrainingError(f"step {step}: the checkpoint cannot be written to {directory}: {error}") from error
    for old in (*_found(directory)[:-_KEPT], *directory.glob(".*.partial")):
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler and archive reader meet
        raise TrainingError(f"{path}: no checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise TrainingError(f"{path}: no checkpoint")
    return state


def resume_state(directory: Path) -> dict[str, Any] | None:
    """The newest state that can be read; a damaged file is passed over, and said."""
    for path in reversed(_found(directory)):
        try:
            return read_checkpoint(path)
        except TrainingError as error:
            log.warning("checkpoint_passed_over", error=str(error))
    return None


def _found(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
