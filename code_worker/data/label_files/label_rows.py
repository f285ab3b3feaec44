"""Lines and rows of label files, and the meaning of their words."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from code_worker.errors import ConfigurationError, DatasetError

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
        """Returns how a person finds it."""
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
            # What is longer than any line is not gathered: a file without line ends takes no memory.
            rest, is_too_long = b"", True
    if rest or is_too_long:
        yield None if is_too_long else rest


def _decoded(number: int, data: bytes, end: str, errors: str) -> Line:
    try:
        text = data.decode(errors=errors)
        return Line(number, text.strip("\r\n"), written=text + end)
    except UnicodeDecodeError as error:
        return Line(number, problem=f"it is not UTF-8 (byte {error.start + 1}): save the file as UTF-8")


TARGETS: Final = ("uri", "image", "path", "sha256")
"""Names of the field that says which image is meant; `sha256` may stand beside another."""
NAMES: Final = TARGETS[:-1]
"""Those of them that hold an address or path, of which every character counts."""
FIELDS: Final = (*TARGETS, "label", "generator", "collection", "group", "by", "at", "note")
_SHOWN: Final = 60


class RowError(ValueError):
    """One row that cannot be read; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Row:
    """One statement of a file, or what is wrong with it.

    Attributes:
        place: where it stands: `line 7`, `task 12`.
        uri: which image; or None, and `sha256` says it.
        sha256: content hash that it must have, if the row names one.
        label: `real` or `fake`.
        generator, collection, group, by, note: as the row says; None where it says nothing.
        at: when it was said, if the row says so.
        problem: why it cannot be used; then nothing else holds.
        unsaid: nobody has said anything of this image; then nothing else holds.
    """

    place: str
    uri: str | None = None
    sha256: str | None = None
    label: str = ""
    generator: str | None = None
    collection: str | None = None
    group: str | None = None
    by: str | None = None
    note: str | None = None
    at: datetime | None = None
    problem: str = ""
    unsaid: bool = False


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of a word in a file."""

    label: str
    generator: str | None = None


class Words:
    """From the words that a file uses to `real` and `fake`, in any case.

    Args:
        mapping: `word=real`, `word=fake` or `word=fake:generator` each; they come before the words known anyway.

    Raises:
        ConfigurationError: an entry of another form, or two for one word.
    """

    def __init__(self, mapping: Iterable[str] = ()) -> None:
        self._meanings: dict[str, Meaning] = {}
        for entry in mapping:
            word, meaning = _mapped(entry)
            if self._meanings.setdefault(word, meaning) != meaning:
                raise ConfigurationError(f"{word!r} is mapped to two meanings")
        for word, label in (("real", "real"), ("fake", "fake"), ("generated", "fake")):
            self._meanings.setdefault(word, Meaning(label))

    def known(self, word: object) -> Meaning | None:
        """Returns what the word means, or None."""
        return self._meanings.get(_folded(word))

    def meaning(self, word: object) -> Meaning:
        """Returns what the word means.

        Raises:
            RowError: nobody said.
        """
        if (found := self.known(word)) is not None:
            return found
        if word is None or not _folded(word):
            raise RowError("it has no label")
        shown = _shown(word)
        raise RowError(f"label {shown!r}: say what it means with --map {shown}=real or --map {shown}=fake")

    def joint(self, words: Iterable[object]) -> Meaning:
        """Returns what several answers about one image mean together; those that are not about it are passed over.

        Raises:
            RowError: none of them is known, or they contradict each other.
        """
        given = list(words)
        found = [meaning for word in given if (meaning := self.known(word)) is not None]
        if not found:
            return self.meaning(given[0] if given else None)
        if len({meaning.label for meaning in found}) > 1:
            raise RowError(f"it says both real and fake: {', '.join(map(_shown, given))}")
        return Meaning(found[0].label, next((meaning.generator for meaning in found if meaning.generator), None))


def _folded(word: object) -> str:
    return str(word).strip().casefold()


def _shown(word: object) -> str:
    return str(word).strip()[:_SHOWN]


def _mapped(entry: str) -> tuple[str, Meaning]:
    word, _, meaning = entry.rpartition("=")
    label, _, generator = meaning.partition(":")
    label = label.strip().casefold()
    if not _folded(word) or label not in {"real", "fake"} or (label == "real" and generator):
        raise ConfigurationError(f"{entry!r} maps nothing: write WORD=real, WORD=fake or WORD=fake:GENERATOR")
    return _folded(word), Meaning(label, generator.strip() or None)


def row_of(place: str, fields: Mapping[str, Any], words: Words, base: str) -> Row:
    """A row from named fields, as CSV and JSON lines have them; a field that nobody knows is passed over.

    Args:
        place: where it stands.
        fields: its values by name.
        words: what its label means.
        base: where relative paths begin.
    """
    try:
        meaning = words.meaning(fields.get("label"))
        targets = {name: target for name in NAMES if (target := text_of(fields, name))}
        if len(set(targets.values())) > 1:
            raise RowError(f"{' and '.join(targets)} name different images: leave one of them empty")
        uri = next(iter(targets.values()), None)
        sha256 = text_of(fields, "sha256")
        if uri is None and sha256 is None:
            raise RowError(f"it names no image: one of {', '.join(TARGETS)} is needed")
        return Row(
            place,
            uri=None if uri is None else located(uri, base),
            sha256=sha256 and sha256.strip().lower(),
            label=meaning.label,
            generator=text_of(fields, "generator") or meaning.generator,
            collection=text_of(fields, "collection"),
            group=text_of(fields, "group"),
            by=text_of(fields, "by"),
            note=text_of(fields, "note"),
            at=moment(text_of(fields, "at")),
        )
    except RowError as error:
        return Row(place, problem=str(error))


def text_of(fields: Mapping[str, Any], name: str) -> str | None:
    """A field's text; None where there is none; a number is taken as it is written.

    Raises:
        RowError: it is neither.
    """
    value = fields.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"{name} must be text, not {_shown(value)!r}")


def moment(value: str | None) -> datetime | None:
    """A time in ISO 8601, UTC unless it says otherwise.

    Raises:
        RowError: it is none.
    """
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(value.strip())
    except ValueError:
        raise RowError(f"{_shown(value)!r} is no time such as 2026-01-31T12:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def located(target: str, base: str) -> str:
    """A URI or absolute path as it is; a relative one from `base`, a directory or an `s3://bucket/prefix`."""
    if "://" in target or target.startswith(("file:", "/")):
        return target
    return f"{base.rstrip('/')}/{target}" if "://" in base else str(Path(base).absolute() / target)
