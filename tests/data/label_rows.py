"""A label file with this content, as it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from code_worker.data.label_files.label_import import read_rows
from code_worker.data.label_files.label_rows import Row, Words


def rows(file: Path, content: str | bytes, *mapping: str, **options: Any) -> list[Row]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(file, Words(mapping), **options))


def problems(found: list[Row]) -> list[tuple[str, str]]:
    return [(row.place, row.problem) for row in found if row.problem]
