"""Tables with named columns: CSV as people, spreadsheets and labelling tools write it, and JSON lines."""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, Final

from code_worker.data.label_files.label_rows import FIELDS, NAMES, TARGETS, Line, Row, Words, numbered_lines, row_of
from code_worker.data.label_files.labelling_tools import STUDIO_COLUMNS, studio_row
from code_worker.errors import DatasetError

_DELIMITERS: Final[tuple[str, ...]] = (",", ";", "\t")
_DECLARED: Final = re.compile(r""""?sep=(\t|[^\s\w"'])"?""")
_MAX_JOINED: Final = 200
_UNCLOSED: Final = "unexpected end of data"
_FORMULA: Final = re.compile(r"'*[=+\-@\t\r\n]")
_TO_QUOTE: Final = re.compile(r'[",\r\n]|^\s|\s$')
_ESCAPED_FORMULA: Final = re.compile(r"'+[=+\-@\t\r\n]")


def without_formulas(text: str) -> str:
    """The text with an apostrophe before it where a spreadsheet would take it for a formula.

    https://owasp.org/www-community/attacks/CSV_Injection
    """
    return f"'{text}" if _FORMULA.match(text) else text


def with_formulas(text: str) -> str:
    """The text that `without_formulas` was given."""
    return text[1:] if _ESCAPED_FORMULA.match(text) else text


def csv_line(values: Iterable[object]) -> str:
    """One line of CSV with its line feed, which `csv_records` reads as it was.

    Quoted is what holds a line end of any kind, also a carriage return alone, and what begins or ends with a blank.
    """
    return ",".join("" if value is None else _quoted(str(value)) for value in values) + "\n"


def _quoted(text: str) -> str:
    return '"{}"'.format(text.replace('"', '""')) if _TO_QUOTE.search(text) else text


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
    """Rows of a CSV file whose first line names the columns, of Label Studio's as well.

    Raises:
        DatasetError: that line lacks a column for the label or for the image, or names one twice.
    """
    expected = f"label and one of {', '.join(TARGETS)} (known are {', '.join(FIELDS)})"
    for record in csv_records(file, _is_header, expected, known=FIELDS):
        place = record.line.place
        if record.problem:
            yield Row(place, problem=record.problem)
        elif record.fields.keys() >= STUDIO_COLUMNS:
            yield studio_row(place, record.fields, words, base)
        else:
            yield row_of(place, record.fields, words, base)


def _is_header(names: Collection[str]) -> bool:
    return STUDIO_COLUMNS.issubset(names) or ("label" in names and not set(TARGETS).isdisjoint(names))


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a table: the line that it begins in, its values by column, or what is wrong with it."""

    line: Line
    fields: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def csv_records(
    file: BinaryIO,
    is_header: Callable[[Collection[str]], bool],
    expected: str,
    *,
    known: Collection[str],
    errors: str = "strict",
) -> Iterator[Record]:
    """Records of a table (comma, semicolon, tab, or as a line `sep=;` says), as spreadsheets write them.

    Values that are missing at the end of a row are empty. Columns without a name and rows without any value are
    passed over. What `without_formulas` escaped is read back. A value in quotes is taken as it is written, unless it
    is blank; without them, blanks around it do not count, but for those that end the name of an image.

    Args:
        file: a file at its beginning.
        is_header: whether these names, in lower case, are those of the first line.
        expected: what it names, for people.
        known: columns that mean something, none of which may be named twice.
        errors: as for `numbered_lines`.

    Raises:
        DatasetError: the first line does not name the columns, or one of them twice.
    """
    lines = numbered_lines(file, errors=errors)
    header, delimiters = _next_filled(lines), _DELIMITERS
    if declared := _DECLARED.fullmatch(header.text.strip(" ")):
        header, delimiters = _next_filled(lines), (declared[1],)
    if header.problem:
        raise DatasetError(f"{header.place}: {header.problem}")
    delimiter, columns = _columns(header.text, delimiters, is_header, expected)
    for name in known:
        if columns.count(name) > 1:
            raise DatasetError(f"the first line names the column {name} twice: rename or remove one of them")
    for record in _Records(lines, delimiter, columns):
        if record.problem or any(record.fields.values()):
            yield record


def _next_filled(lines: Iterator[Line]) -> Line:
    return next((line for line in lines if line.text.strip() or line.problem), Line(1))


def _columns(
    text: str, delimiters: Collection[str], is_header: Callable[[Collection[str]], bool], expected: str
) -> tuple[str, list[str]]:
    # Tried one after the other on the names of the columns: counting characters would be misled by a comma in a note.
    for delimiter in delimiters:
        try:
            names = [name.strip().lower() for name in _parsed(text, delimiter)]
        except csv.Error:
            continue
        if is_header(names):
            return delimiter, names
    raise DatasetError(f"the first line must name the columns, among them {expected}; it is {text[:200]!r}")


class _Records:
    """Records of a CSV file; a quoted field may go over several lines.

    A quote that somebody forgot to close would swallow all that follows up to the next quote: where that gives no
    record of the full width, its own line is the bad one, and reading goes on with the line after it.
    """

    def __init__(self, lines: Iterator[Line], delimiter: str, columns: list[str]) -> None:
        self._lines = lines
        self._delimiter = delimiter
        self._columns = columns
        # Spreadsheets write columns without a name, some to the right of all others.
        self._least = max(number for number, name in enumerate(columns, 1) if name)
        self._returned: deque[Line] = deque()

    def __iter__(self) -> Iterator[Record]:
        while (line := self._next()) is not None:
            if line.problem:
                yield Record(line, problem=line.problem)
            elif line.text.strip():
                yield self._record(line)

    def _next(self) -> Line | None:
        return self._returned.popleft() if self._returned else next(self._lines, None)

    def _record(self, line: Line) -> Record:
        # What stands before the first value is of the line end before.
        text, taken = line.written.lstrip("\r\n"), list[Line]()
        while True:
            problem, values = self._tried(text, may_be_short=not taken)
            if not problem:
                return Record(line, dict(zip(self._columns, self._trimmed(text, values), strict=True)))
            if problem != _UNCLOSED or len(taken) == _MAX_JOINED or (more := self._next()) is None:
                break
            taken.append(more)
            text += more.written
        # In front of the file again, in their order: each of these lines may be a good record.
        self._returned.extendleft(reversed(taken))
        return Record(line, problem="a quote is never closed" if taken or problem == _UNCLOSED else problem)

    def _trimmed(self, text: str, values: Sequence[str]) -> Iterator[str]:
        """Without what a person who wrote blanks around values did not mean."""
        in_quotes: Sequence[bool] = ()
        for place, value in enumerate(values):
            kept = value.strip()
            if kept and kept != value:
                in_quotes = in_quotes or _in_quotes(text, self._delimiter)
                is_name = self._columns[place] in NAMES
                kept = value if in_quotes[place] else value.lstrip() if is_name else kept
            yield with_formulas(kept)

    def _tried(self, text: str, *, may_be_short: bool) -> tuple[str, list[str]]:
        most = len(self._columns)
        try:
            values = _parsed(text, self._delimiter)
        except csv.Error as error:
            if "new-line" not in str(error):
                return str(error), []
            stray = "carriage return" if "\r" in text.rstrip("\r\n") else "line feed"
            return f"a {stray} stands in it outside quotes", []
        if any(map(str.strip, values[most:])) or (len(values) < self._least and not may_be_short):
            return f"{len(values)} values under {self._least} columns", []
        return "", [*values[:most], *[""] * (most - len(values))]


def _parsed(text: str, delimiter: str) -> list[str]:
    (values,) = csv.reader([text], strict=True, delimiter=delimiter) if text else [[]]
    return values


def _in_quotes(text: str, delimiter: str) -> list[bool]:
    """Of each value of a record that `_parsed` took, whether it is quoted."""
    end = re.escape(delimiter)
    return [bool(value[1]) for value in re.finditer(rf'("[^"]*(?:""[^"]*)*"|)[^{end}]*(?:{end}|$)', text)]
