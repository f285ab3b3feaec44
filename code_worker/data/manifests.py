"""Lists of labelled images: JSON lines, or CSV with a header, each row naming an image and what it is."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from code_worker.data.examples import FAKE, Example, Skipped
from code_worker.data.names import label_of, printable
from code_worker.data.reading import FromSource
from code_worker.errors import DatasetError

if TYPE_CHECKING:
    from code_worker.data.kept import KeptImages
    from code_worker.images.source import Sources

__all__ = ["manifest_examples"]

_WAYS: Final = ("uri", "path", "sha256")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def manifest_examples(path: Path, sources: Sources, kept: KeptImages, *, skipped: list[Skipped]) -> Iterator[Example]:
    """Images that a manifest names, in its order.

    Fields: `label` (real or 0, fake or 1) and one of `uri`, `path` (both relative to the manifest, unless they say
    otherwise) and `sha256` (a kept copy); beside a `uri` or `path` the hash is checked when the bytes are read.
    Optional: `generator`, `collection`, `group`, `variant`; any other is passed over.

    Args:
        path: The manifest; `.csv` by name, else JSON lines.
        sources: What reads URIs and paths.
        kept: Copies that hashes name.
        skipped: Takes rows that cannot be used, by line number.

    Raises:
        DatasetError: the manifest cannot be read, or its header has no label or nothing that names an image.
    """
    try:
        # Names on this machine need not be UTF-8.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
            for where, row in rows(file, path, skipped):
                try:
                    yield _example(row, path, sources, kept)
                except ValueError as error:
                    skipped.append(Skipped(where, str(error)))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error


def _json_rows(lines: Iterable[str], path: Path, skipped: list[Skipped]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            skipped.append(Skipped(where, f"not JSON: {error}"))
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            skipped.append(Skipped(where, "not a JSON object"))


def _csv_rows(file: IO[str], path: Path, skipped: list[Skipped]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(file, restkey="more")
    header = {name.strip().lower() for name in _next_header(reader, path)}
    if "label" not in header or header.isdisjoint(_WAYS):
        raise DatasetError(
            f"{path}: its first line must name the columns label and one of uri, path, sha256; it names "
            f"{', '.join(sorted(map(printable, header))) or 'none'}"
        )
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            skipped.append(Skipped(f"{path}:{reader.reader.line_num}", f"not CSV: {error}"))
            continue
        if row is None:
            return
        yield f"{path}:{reader.reader.line_num}", {str(name).strip().lower(): value for name, value in row.items()}


def _next_header(reader: csv.DictReader[str], path: Path) -> Iterable[str]:
    try:
        return reader.fieldnames or ()
    except csv.Error as error:
        raise DatasetError(f"{path}: not CSV: {error}") from error


def _example(row: Mapping[str, Any], path: Path, sources: Sources, kept: KeptImages) -> Example:
    label, sha256 = label_of(row.get("label")), _hash(_text(row, "sha256"))
    uri = _address(row, path.parent)
    read: Callable[[], bytes]
    if uri is not None:
        key, read = printable(uri), FromSource(sources, uri, sha256)
    elif sha256 is not None:
        key, read = sha256, partial(kept.read, sha256)
    else:
        raise ValueError("names no image: uri, path and sha256 are missing")
    return Example(
        key=key,
        label=label,
        read=read,
        generator=_text(row, "generator") if label == FAKE else None,
        collection=_text(row, "collection"),
        group=_text(row, "group"),
        variant=_text(row, "variant"),
        sha256=sha256,
    )


def _hash(value: str | None) -> str | None:
    if value is not None and not _SHA256.fullmatch(value := value.lower()):
        raise ValueError(f"sha256 is {value[:80]!r}; it must be 64 hexadecimal digits")
    return value


def _address(row: Mapping[str, Any], directory: Path) -> str | None:
    """URI, or path on this machine; a relative one begins at the manifest."""
    uri = _text(row, "uri")
    if uri is not None and _SCHEME.match(uri):
        return uri
    path = uri or _text(row, "path")
    return None if path is None else str(directory.resolve() / path)


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:80]!r}, not text")  # noqa: TRY004 - one more row that is wrong
    return value.strip() or None
