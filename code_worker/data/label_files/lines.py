"""Lines of a text file with their numbers; what cannot be read costs one line, never the file."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

__all__ = ["Line", "numbered_lines"]

_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end, counted from 1, or why it cannot be read."""

    number: int
    text: str = ""
    problem: str = ""

    @property
    def place(self) -> str:
        """How a person finds it."""
        return f"line {self.number}"


def numbered_lines(file: BinaryIO) -> Iterator[Line]:
    """Every line of a UTF-8 file, in memory for one line; a byte-order mark is dropped."""
    number = 0
    while data := file.readline(_MAX_BYTES + 1):
        number += 1
        if len(data) > _MAX_BYTES:
            while not data.endswith(b"\n") and (data := file.readline(_MAX_BYTES)):
                pass
            yield Line(number, problem=f"it is longer than {_MAX_BYTES} bytes")
            continue
        yield _decoded(number, data.removeprefix(codecs.BOM_UTF8) if number == 1 else data)


def _decoded(number: int, data: bytes) -> Line:
    try:
        return Line(number, data.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return Line(number, problem=f"it is not UTF-8 (byte {error.start + 1})")
