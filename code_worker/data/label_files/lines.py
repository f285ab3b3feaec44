"""Lines of a text file with their numbers; what cannot be read costs one line, never the file."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from code_worker.errors import DatasetError

__all__ = ["UTF16", "Line", "numbered_lines"]

UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte-order marks of what spreadsheets call Unicode text."""
_MAX_BYTES: Final = 1 << 20
_CHUNK_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Line:
    """One line, counted from 1, or why it cannot be read.

    Attributes:
        text: the line without its end.
        written: the line as it stands in the file, up to the next one.
    """

    number: int
    text: str = ""
    problem: str = ""
    written: str = ""

    @property
    def place(self) -> str:
        """How a person finds it."""
        return f"line {self.number}"


def numbered_lines(file: BinaryIO, *, errors: str = "strict") -> Iterator[Line]:
    """Every line of a file in UTF-8, or in UTF-16 with a byte-order mark; in memory for one line.

    All lines end as the first one does: with a line feed, or with a carriage return alone, as on old Macs.

    Args:
        file: a file at its beginning.
        errors: `surrogateescape` takes bytes that are not UTF-8, as names of files may have them.

    Raises:
        DatasetError: it begins as UTF-16 and is none.
    """
    chunks = _utf8(file)
    first = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
    end = _end_of(first)
    for number, data in enumerate(_split(itertools.chain([first], chunks), end), 1):
        if data is None:
            yield Line(number, problem=f"it is longer than {_MAX_BYTES} bytes")
        else:
            yield _decoded(number, data, end.decode(), errors)


def _utf8(file: BinaryIO) -> Iterator[bytes]:
    chunk = file.read(_CHUNK_BYTES)
    if not chunk.startswith(UTF16):
        while chunk:
            yield chunk
            chunk = file.read(_CHUNK_BYTES)
        return
    decoder = codecs.getincrementaldecoder("utf-16")()
    try:
        while chunk:
            yield decoder.decode(chunk).encode()
            chunk = file.read(_CHUNK_BYTES)
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise DatasetError(f"it begins as UTF-16, but is cut short or damaged: {error}") from None


def _end_of(first: bytes) -> bytes:
    at = first.find(b"\r")
    alone = at >= 0 and b"\n" not in first[: at + 2]
    return b"\r" if alone else b"\n"


def _split(chunks: Iterable[bytes], end: bytes) -> Iterator[bytes | None]:
    """Lines as they are; None for one that is too long."""
    rest, is_too_long = b"", False
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(end)
        for line in lines:
            yield None if is_too_long or len(line) > _MAX_BYTES else line
            is_too_long = False
        if len(rest) > _MAX_BYTES:
            rest, is_too_long = b"", True
    if rest or is_too_long:
        yield None if is_too_long else rest


def _decoded(number: int, data: bytes, end: str, errors: str) -> Line:
    try:
        text = data.decode(errors=errors)
        return Line(number, text.strip("\r\n"), written=text + end)
    except UnicodeDecodeError as error:
        return Line(number, problem=f"it is not UTF-8 (byte {error.start + 1}): save the file as UTF-8")
