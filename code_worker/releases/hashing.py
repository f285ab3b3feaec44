"""Hashes of files and of sets of files: what integrity and provenance are built on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from code_worker.errors import IntegrityError

__all__ = ["FileEntry", "OnBytes", "Sha256", "describe_files", "digest_of", "files_below", "hash_file"]

_CHUNK = 2**20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OnBytes = Callable[[int], None]


class FileEntry(BaseModel):
    """Content of one file: sha256 and size in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Sha256
    size: int = Field(ge=0)


def digest_of(sha256_by_name: Mapping[str, str], extra: Mapping[str, JsonValue] | None = None) -> str:
    """One sha256 over the sha256 of several files (keyed by relative path) and `extra` facts."""
    plain = {"files": dict(sha256_by_name), "extra": dict(extra or {})}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path, on_bytes: OnBytes | None = None) -> FileEntry:
    """Sha256 and size of a file's content, read in pieces; `on_bytes` hears of each piece's size."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return FileEntry(sha256=digest.hexdigest(), size=size)


def files_below(directory: Path) -> list[str]:
    """Relative POSIX paths of the regular files below `directory`, sorted.

    Raises:
        IntegrityError: a symbolic link or anything else that is neither file nor directory.
    """
    return sorted(_walk(directory, ""))


def _walk(directory: Path, prefix: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise IntegrityError(f"{entry.path} is neither a file nor a directory; links are not followed")


def describe_files(directory: Path, leave_out: Collection[str] = ()) -> dict[str, FileEntry]:
    """Hash and size of every file below `directory` but those named in `leave_out`."""
    return {name: hash_file(directory / name) for name in files_below(directory) if name not in leave_out}
