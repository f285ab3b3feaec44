"""Label files with named fields: CSV with a header, and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from code_worker.data.label_files.lines import Line, numbered_lines
from code_worker.data.label_files.rows import FIELDS, TARGETS, Row, Words, row_of
from code_worker.errors import DatasetError

__all__ = ["csv_rows", "json_rows"]

_DELIMITERS: Final = (",", ";", "\t")
_MAX_JOINED: Final = 200
_UNCLOSED: Final = "unexpected end of data"


def json_rows(file: BinaryIO, words: Words, base: str) -> Iterator[Row]:
    """Rows of a file with one JSON object per line."""
    for line in numbered_lines(file):
        if line.problem:
            yield Row(line.place, problem=line.problem)
        elif line.text.strip():
            yield _json_row(line, words, base)


def _json_row(line: Line, words: Words, base: str) -> Row:
    try:
        fields = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        return Row(line.place, problem=f"it is not JSON: {error}")
    if not isinstance(fields, dict):
        return Row(line.place, problem="it is no JSON object")
    return row_of(line.place, fields, words, base)


def csv_rows(file: BinaryIO, words: Words, base: str) -> Iterator[Row]:
    """Rows of a CSV file (comma, semicolon or tab) whose first line names the columns.

    Raises:
        DatasetError: that line lacks a column for the label or for the image.
    """
    lines = numbered_lines(file)
    header = next((line for line in lines if line.text.strip() or line.problem), Line(1))
    if header.problem:
        raise DatasetError(f"{header.place}: {header.problem}")
    delimiter, columns = _columns(header)
    for record in _Records(lines, delimiter, len(columns)):
        if record.problem:
            yield Row(record.line.place, problem=record.problem)
        else:
            yield row_of(record.line.place, dict(zip(columns, record.values, strict=True)), words, base)


def _columns(header: Line) -> tuple[str, list[str]]:
    for delimiter in _DELIMITERS:
        try:
            names = [name.lower() for name in _parsed(header.text, delimiter)]
        except csv.Error:
            continue
        if "label" in names and not set(TARGETS).isdisjoint(names):
            return delimiter, names
    raise DatasetError(
        f"the first line must name the columns, with label and one of {', '.join(TARGETS)} among them "
        f"(known are {', '.join(FIELDS)}); it is {header.text[:200]!r}"
    )


@dataclass(frozen=True, slots=True)
class _Record:
    line: Line
    values: tuple[str, ...] = ()
    problem: str = ""


class _Records:
    """Records of a CSV file; a quoted field may go over several lines.

    A quote that somebody forgot to close would swallow all that follows up to the next quote: where that gives no
    record of the right width, its own line is the bad one, and reading goes on with the line after it.
    """

    def __init__(self, lines: Iterator[Line], delimiter: str, width: int) -> None:
        self._lines = lines
        self._delimiter = delimiter
        self._width = width
        self._returned: deque[Line] = deque()

    def __iter__(self) -> Iterator[_Record]:
        while (line := self._next()) is not None:
            if line.problem:
                yield _Record(line, problem=line.problem)
            elif line.text.strip():
                yield self._record(line)

    def _next(self) -> Line | None:
        return self._returned.popleft() if self._returned else next(self._lines, None)

    def _record(self, line: Line) -> _Record:
        text, taken = line.text, list[Line]()
        while True:
            problem, values = self._tried(text)
            if not problem:
                return _Record(line, values)
            if problem != _UNCLOSED or len(taken) == _MAX_JOINED or (more := self._next()) is None:
                break
            taken.append(more)
            text = f"{text}\n{more.text}"
        self._returned.extendleft(reversed(taken))
        return _Record(line, problem="a quote is never closed" if taken or problem == _UNCLOSED else problem)

    def _tried(self, text: str) -> tuple[str, tuple[str, ...]]:
        try:
            values = _parsed(text, self._delimiter)
        except csv.Error as error:
            return str(error), ()
        if len(values) != self._width:
            return f"{len(values)} values under {self._width} columns", ()
        return "", tuple(values)


def _parsed(text: str, delimiter: str) -> list[str]:
    (values,) = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter) if text else [[]]
    return [value.strip() for value in values]
