"""Lists of labelled images: JSON lines, or CSV with a header, each row naming an image and what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from code_worker.data.datasets.examples import FAKE, Example, FromSource, Skipped, label_of
from code_worker.data.label_files.label_rows import numbered_lines
from code_worker.data.label_files.tables import csv_records
from code_worker.errors import DatasetError
from code_worker.system.terminal import printable

if TYPE_CHECKING:
    from code_worker.data.kept_copies import KeptImages
    from code_worker.images.source import Sources

_WAYS: Final = ("uri", "path", "sha256")
_KNOWN: Final = (*_WAYS, "label", "generator", "collection", "group", "variant")
_ERRORS: Final = "surrogateescape"
"""Names on this machine need not be UTF-8."""
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
        with path.open("rb") as file:
            for where, row in (_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(file, path, skipped):
                try:
                    yield _example(row, path, sources, kept)
                except ValueError as error:
                    skipped.append(Skipped(where, str(error)))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error


def _json_rows(file: BinaryIO, path: Path, skipped: list[Skipped]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for line in numbered_lines(file, errors=_ERRORS):
        where = f"{path}:{line.number}"
        if not line.problem and not line.text.strip():
            continue
        try:
            row = None if line.problem else json.loads(line.text)
        except (ValueError, RecursionError) as error:
            skipped.append(Skipped(where, f"not JSON: {error}"))
            continue
        if isinstance(row, dict):
            yield where, {name: _without_ends(value) if name in _WAYS else value for name, value in row.items()}
        else:
            skipped.append(Skipped(where, line.problem or "not a JSON object"))


def _without_ends(value: Any) -> Any:
    """An address as a program wrote it that took it from a line; blanks at its end may be a key's own."""
    return value.lstrip().rstrip("\r\n") if isinstance(value, str) else value


def _csv_rows(file: BinaryIO, path: Path, skipped: list[Skipped]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        for record in csv_records(
            file, _is_header, "label and one of uri, path, sha256", known=_KNOWN, errors=_ERRORS
        ):
            where = f"{path}:{record.line.number}"
            if record.problem:
                skipped.append(Skipped(where, record.problem))
            else:
                yield where, record.fields
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


def _is_header(names: Collection[str]) -> bool:
    return "label" in names and not set(_WAYS).isdisjoint(names)


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
        # Tables have the column in every row: what stands there for a real image is no statement.
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
    uri = _text(row, "uri", as_written=True)
    if uri is not None and _SCHEME.match(uri):
        return uri
    path = uri or _text(row, "path", as_written=True)
    return None if path is None else str(directory.resolve() / path)


def _text(row: Mapping[str, Any], name: str, *, as_written: bool = False) -> str | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:80]!r}, not text")  # noqa: TRY004 - one more row that is wrong
    text = value.strip()
    return (value if as_written else text) if text else None
