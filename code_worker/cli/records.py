"""Verdicts and jobs as flat records: the same names in JSON and CSV, whoever prints them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from code_worker.cli.output import shown_json, to_json
from code_worker.data.label_files.tables import csv_line, without_formulas
from code_worker.terminal import printable

if TYPE_CHECKING:
    from code_worker.store.jobs import JobInfo
    from code_worker.types import Verdict

__all__ = [
    "SCAN_FIELDS",
    "VERDICT_FIELDS",
    "job_record",
    "judgement",
    "verdict_record",
    "write_csv",
    "write_csv_row",
    "write_json_lines",
]

SCAN_FIELDS = (
    *("uri", "sha256", "outcome", "label", "score", "reason", "head", "release"),
    *("detail", "policy", "low", "high", "format", "width", "height", "mode", "size_bytes"),
    *("etag", "version_id", "manifest_sha256", "head_sha256", "head_plugin", "code_version", "timings_ms"),
)
"""What is known of an image that was judged without a job."""
VERDICT_FIELDS = (
    *SCAN_FIELDS,
    *("tenant", "content_type", "metadata", "id", "job_id", "revision", "supersedes", "created_at"),
)


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """Every field of a verdict, facts and provenance on the same level; see `VERDICT_FIELDS`."""
    flat = asdict(verdict)
    inner = {**(flat.pop("facts") or {}), **flat.pop("provenance")}
    values = {**inner, **flat}
    return {name: values.get(name) for name in VERDICT_FIELDS}


def job_record(job: JobInfo) -> dict[str, Any]:
    """Every field of a job."""
    return asdict(job)


def judgement(verdict: Verdict) -> str:
    """The answer in one word: the label, or why there is none."""
    return str(verdict.label or verdict.reason)


def write_csv(
    rows: Iterable[Mapping[str, Any]], fields: Iterable[str], stream: IO[str], *, raw: bool = False
) -> None:
    """A header and one line per row; what is no plain value is written as JSON, formulas as text unless `raw`.

    A terminal gets escapes for what it would act on; files and pipes get every value as it is.
    """
    names = tuple(fields)
    stream.write(csv_line(names))
    for row in rows:
        write_csv_row(row, names, stream, raw=raw)


def write_csv_row(row: Mapping[str, Any], fields: Iterable[str], stream: IO[str], *, raw: bool = False) -> None:
    """One line of CSV, as `write_csv` writes it."""
    line = csv_line(_cell(row[name], raw=raw) for name in fields)
    stream.write(f"{printable(line[:-1])}\n" if stream.isatty() else line)


def write_json_lines(rows: Iterable[Mapping[str, Any]], stream: IO[str]) -> None:
    """One JSON object per line, into a file, a pipe or, with escapes, a terminal."""
    stream.writelines(f"{shown_json(to_json(row), stream)}\n" for row in rows)


def _cell(value: object, *, raw: bool) -> object:
    if isinstance(value, str):
        return value if raw else without_formulas(value)
    if value is None or isinstance(value, int | float):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else to_json(value)
