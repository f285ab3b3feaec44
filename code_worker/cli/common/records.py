"""Verdicts and jobs as flat records, and a verdict in plain words for an appeal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any, Final

from code_worker.cli.common.output import moment, plural, shown_json, to_json
from code_worker.data.label_files.tables import csv_line, without_formulas
from code_worker.system.terminal import printable
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from code_worker.store.jobs import JobInfo
    from code_worker.types import Verdict

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


_FILE: Final = "no: the file is at fault"
_LIMITS: Final = "no, unless you change the limits"
_MENDED: Final = "once the source or the settings are mended"
_YES: Final = "yes"
_LOOK: Final = "yes, after a look at the worker's log"
_RESERVED: Final = "reserved: this version gives none of them"
RETRY_HELPS: Final[Mapping[RejectReason, str]] = {
    **dict.fromkeys(
        (RejectReason.EMPTY, RejectReason.TRUNCATED, RejectReason.CORRUPT, RejectReason.UNSUPPORTED_FORMAT), _FILE
    ),
    **dict.fromkeys((RejectReason.TOO_LARGE_BYTES, RejectReason.TOO_MANY_PIXELS, RejectReason.TOO_SMALL), _LIMITS),
    **dict.fromkeys(
        (
            RejectReason.NOT_FOUND,
            RejectReason.ACCESS_DENIED,
            RejectReason.ARCHIVED,
            RejectReason.SOURCE_NOT_ALLOWED,
            RejectReason.CONTENT_CHANGED,
        ),
        _MENDED,
    ),
    **dict.fromkeys(
        (
            RejectReason.FETCH_TIMEOUT,
            RejectReason.FETCH_TRUNCATED,
            RejectReason.FETCH_FAILED,
            RejectReason.CHECKSUM_MISMATCH,
        ),
        _YES,
    ),
    RejectReason.MODEL_UNAVAILABLE: "yes, with a head and a release that exist",
    RejectReason.QUARANTINED: _LOOK,
    RejectReason.INTERNAL: _LOOK,
    **dict.fromkeys((RejectReason.DECODE_TIMEOUT, RejectReason.STORAGE_FULL, RejectReason.ID_CONFLICT), _RESERVED),
}
"""Whether it helps to have the job judged again, as docs/operations.md says it."""


def explain(verdict: Verdict) -> tuple[str, dict[str, Any]]:
    """One sentence that says what was decided and why, and the facts behind it by name."""
    provenance = verdict.provenance
    facts = {
        "image": verdict.uri,
        "content": _content(verdict),
        "source version": verdict.facts and (verdict.facts.version_id or verdict.facts.etag),
        "release": _with_hash(provenance.release, provenance.manifest_sha256, "manifest"),
        "head": _with_hash(provenance.head, provenance.head_sha256, "files"),
        "plugin": provenance.head_plugin,
        "policy": _thresholds(verdict),
        "score": None if verdict.score is None else f"{verdict.score:.6f} (0 real … 1 generated)",
        "detail": verdict.detail or None,
        "tenant": verdict.tenant,
        "content type": verdict.content_type,
        "metadata": to_json(verdict.metadata) if verdict.metadata else None,
        "decided": moment(verdict.created_at) and f"{moment(verdict.created_at)} UTC",
        "code": provenance.code_version,
        "took": _timings(verdict),
        "job": verdict.job_id,
        "verdict": f"{verdict.id} (revision {verdict.revision})",
        "judges again": verdict.supersedes and f"{verdict.supersedes}, which stays",
    }
    return _sentence(verdict), facts


def _sentence(verdict: Verdict) -> str:
    if verdict.score is None:
        helps = RETRY_HELPS[verdict.reason] if verdict.reason else _LOOK
        return f"Rejected, not judged: {verdict.reason}. Does a retry help? {helps[0].upper()}{helps[1:]}."
    low, high = verdict.provenance.low, verdict.provenance.high
    if low is None or high is None:
        return f"Judged {verdict.label}: score {verdict.score:.3f}."
    if verdict.score >= high:
        why = f"at or above {high:g}, where fake begins"
    elif verdict.score < low:
        why = f"below {low:g}, where real ends"
    else:
        why = f"between {low:g} and {high:g}, which the policy leaves open"
    return f"Judged {verdict.label}: head {verdict.head} gave a score of {verdict.score:.3f}, {why}."


def _content(verdict: Verdict) -> str | None:
    if (facts := verdict.facts) is None:
        return None
    size = f"{facts.width}×{facts.height} {facts.mode}" if facts.width else None
    parts = (facts.format, size, plural(facts.size_bytes, "byte"), f"sha256 {facts.sha256}")
    return ", ".join(part for part in parts if part)


def _with_hash(name: str | None, sha256: str | None, of: str) -> str | None:
    return f"{name} ({of} sha256 {sha256})" if name and sha256 else name


def _thresholds(verdict: Verdict) -> str | None:
    provenance = verdict.provenance
    if provenance.low is None or provenance.high is None:
        return provenance.policy
    return f"{provenance.policy}: real below {provenance.low:g}, fake from {provenance.high:g}"


def _timings(verdict: Verdict) -> str | None:
    stages = (
        "embedding reused" if stage == "reused" else f"{stage} {value:.0f} ms"
        for stage, value in verdict.timings_ms.items()
    )
    return ", ".join(stages) or None
