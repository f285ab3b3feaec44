"""The first directory of a TIFF, read without believing it (TIFF 6.0 §2, BigTIFF)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from code_worker.errors import ImageRejectedError
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["check_tiff_parts", "tiff_ends", "tiff_tile_size"]

_TYPE_BYTES: Final = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
_INTEGERS: Final = {3: "H", 4: "L", 16: "Q"}
_MOST: Final = 65_536
_MOST_PARTS: Final = 65_536
"""Rows of four planes at the longest side, or the largest image in tiles of 32 by 32."""
_PARTS: Final = (273, 279, 324, 325)
"""StripOffsets, StripByteCounts, TileOffsets, TileByteCounts."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of a directory: what it is, how many values of which type, and where in the file they are."""

    tag: int
    kind: int
    values: int
    at: int

    @property
    def size(self) -> int:
        return self.values * _unit(self.kind)


class _Directory:
    """The first directory; it may lie beyond the end of the file."""

    def __init__(self, data: bytes) -> None:
        self.order = "<" if data[:2] == b"II" else ">"
        big = struct.unpack_from(f"{self.order}H", data, 2)[0] == 43
        forms = ("Q", "HHQ", "Q") if big else ("H", "HHL", "L")
        self._count, self._entry, self._word = (self.order + form for form in forms)
        self._data = data
        self.word_bytes = struct.calcsize(self._word)
        self._step = struct.calcsize(self._entry) + self.word_bytes
        self._at: int = struct.unpack_from(self._word, data, self.word_bytes)[0]
        self.begin: int = self._at + struct.calcsize(self._count)

    @property
    def end(self) -> int:
        """Where it ends, the link to the next one included."""
        return int(self.begin + self._entries * self._step + self.word_bytes)

    @property
    def _entries(self) -> int:
        (count,) = struct.unpack_from(self._count, self._data, self._at)
        return int(count)

    def __iter__(self) -> Iterator[_Entry]:
        last = min(self.begin + min(self._entries, _MOST) * self._step, len(self._data) - self._step + 1)
        for at in range(self.begin, last, self._step):
            tag, kind, values = struct.unpack_from(self._entry, self._data, at)
            here = at + self._step - self.word_bytes
            far = values * _unit(kind) > self.word_bytes
            yield _Entry(tag, kind, values, struct.unpack_from(self._word, self._data, here)[0] if far else here)


def _unit(kind: int) -> int:
    return _TYPE_BYTES[kind] if kind < len(_TYPE_BYTES) else 0


def check_tiff_parts(data: bytes) -> None:
    """Refuses lists of strips or tiles that are longer than any image within the limits needs.

    Pillow makes a Python number of each place in them, which takes ten times what it takes in the file.

    Raises:
        ImageRejectedError: such a list.
        struct.error: the file ends in its header.
    """
    directory = _Directory(data)
    if directory.begin > len(data):
        return
    for entry in directory:
        # Of one that the file does not hold Pillow makes nothing.
        if entry.tag in _PARTS and entry.values > _MOST_PARTS and entry.at + entry.size <= len(data):
            raise ImageRejectedError(RejectReason.CORRUPT, f"tiff: {entry.values} strips or tiles")


def tiff_tile_size(tags: Mapping[int, Any]) -> tuple[int, int]:
    """Width and height of one tile, `(0, 0)` for an image in strips: libtiff makes room for a whole tile at once."""
    width, height = tags.get(322), tags.get(323)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)


def tiff_ends(data: bytes) -> Iterator[int]:
    """Where each part that the first directory names would end."""
    directory = _Directory(data)
    yield directory.begin
    if directory.begin > len(data):
        return
    yield directory.end
    parts: dict[int, tuple[int, ...]] = {}
    for entry in directory:
        end = entry.at + entry.size
        yield end
        if entry.tag in _PARTS and entry.kind in _INTEGERS and entry.values <= _MOST and end <= len(data):
            form = f"{directory.order}{entry.values}{_INTEGERS[entry.kind]}"
            parts[entry.tag] = struct.unpack_from(form, data, entry.at)
    for offsets, sizes in (_PARTS[:2], _PARTS[2:]):
        yield from map(sum, zip(parts.get(offsets, ()), parts.get(sizes, ()), strict=False))
