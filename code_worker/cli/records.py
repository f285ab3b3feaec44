"""Verdicts and jobs as flat records: the same names in JSON and CSV, whoever prints them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from code_worker.cli.output import to_json
from code_worker.data.label_files.tables import csv_line, without_formulas

if TYPE_CHECKING:
    from code_worker.store.jobs import JobInfo
    from code_worker.types import Verdict

__all__ = ["SCAN_FIELDS", "VERDICT_FIELDS", "csv_record", "job_record", "judgement", "verdict_record", "write_csv"]

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
    """A header and one line per row; what is no plain value is written as JSON, formulas as text unless `raw`."""
    names = tuple(fields)
    stream.write(csv_line(names))
    for row in rows:
        stream.write(csv_record(row, names, raw=raw))


def csv_record(row: Mapping[str, Any], fields: Iterable[str], *, raw: bool = False) -> str:
    """One line of CSV; text that a spreadsheet would run as a formula stays text, unless it is to be `raw`."""
    return csv_line(_cell(row[name], raw=raw) for name in fields)


def _cell(value: object, *, raw: bool) -> object:
    if isinstance(value, str):
        return value if raw else without_formulas(value)
    if value is None or isinstance(value, int | float):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else to_json(value)
