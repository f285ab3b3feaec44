"""Ways in which an example's bytes are read, and what may be read for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from code_worker.data.examples import Skipped
from code_worker.errors import DatasetError
from code_worker.images.listing import LFS_POINTER
from code_worker.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from code_worker.images.listing import LeftOut
    from code_worker.images.source import Sources
    from code_worker.settings import Settings

__all__ = ["FromSource", "Held", "allow", "check_hash", "disguise", "not_images"]


def allow(settings: Settings, root: Path) -> Settings:
    """The settings, with a directory that the caller named allowed to be read: who names it may read it anyway."""
    files = settings.files.model_copy(update={"roots": (*settings.files.roots, root)})
    return settings.model_copy(update={"files": files})


def disguise(head: bytes) -> str | None:
    """What a file is that has another content than its name promises, by its first bytes; and what to do."""
    if head.startswith(LFS_POINTER):
        return "it is a Git LFS pointer: `git lfs pull` fetches the file"
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip: unpack it first"
    if head.startswith(b"PK\3\4"):
        return "it is a zip archive or a spreadsheet: unpack it, or save it as CSV"
    return None


def check_hash(data: bytes, sha256: str | None, key: str) -> bytes:
    """The bytes, unless a hash was promised that is not theirs.

    Raises:
        DatasetError: they are others.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DatasetError(f"{key}: the bytes are not those of sha256 {sha256[:12]}…, which its data set names")
    return data


def not_images(place: str, left_out: LeftOut) -> Iterator[Skipped]:
    """One entry for each reason for which files of a place were passed over; they are named from there on."""
    start = place.rstrip("/") + "/"
    for reason, files, names in left_out.passed_over:
        some = tuple(printable(name.removeprefix(start)) for name in names)
        yield Skipped(printable(place), reason, files, some)


@dataclass(frozen=True, slots=True)
class FromSource:
    """Fetches a URI or path each time it is called; raises as `Sources.fetch` does, or as `check_hash`."""

    sources: Sources
    uri: str
    sha256: str | None = None

    def __call__(self) -> bytes:
        """The bytes."""
        return check_hash(self.sources.fetch(self.uri).data, self.sha256, self.uri)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of a stream, which cannot be read a second time."""

    data: bytes = field(repr=False)

    def __call__(self) -> bytes:
        """The bytes."""
        return self.data
