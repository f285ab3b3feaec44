"""What a demonstration found: figures counted from its database, and whether everything is as it must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from code_worker.demo.images import REAL, Broken, Picture
from code_worker.types import Label, Outcome

if TYPE_CHECKING:
    from code_worker.demo.run import Result

__all__ = ["SourceRow", "by_reason", "by_source", "checks", "images_per_s"]


@dataclass(frozen=True, slots=True)
class SourceRow:
    """How the images of one source were judged; `right` is the share that got the label they should."""

    source: str
    images: int
    fake: int
    real: int
    right: float


def by_source(result: Result) -> list[SourceRow]:
    """One row for real images, one per toy generator, one over all."""
    labels: dict[str, Counter[Label]] = {}
    for verdict in result.verdicts:
        if verdict.label is not None:
            labels.setdefault(verdict.metadata["source"], Counter())[verdict.label] += 1
    rows = [
        _row(source, found) for source, found in sorted(labels.items(), key=lambda pair: (pair[0] != REAL, pair[0]))
    ]
    total = sum(row.images for row in rows)
    right = sum(row.right * row.images for row in rows)
    return [
        *rows,
        SourceRow("all", total, sum(row.fake for row in rows), sum(row.real for row in rows), right / max(1, total)),
    ]


def _row(source: str, found: Counter[Label]) -> SourceRow:
    right = found[Label.REAL if source == REAL else Label.FAKE]
    return SourceRow(source, found.total(), found[Label.FAKE], found[Label.REAL], right / found.total())


def by_reason(result: Result) -> dict[str, list[str]]:
    """Names of rejected images by reason."""
    names: dict[str, list[str]] = {}
    for verdict in result.verdicts:
        if verdict.reason is not None:
            names.setdefault(str(verdict.reason), []).append(result.asked[verdict.uri].name)
    return dict(sorted(names.items()))


def images_per_s(result: Result) -> float | None:
    """Jobs per second from the first claim to the last verdict, by the database's clock."""
    began = min((job.claimed_at for job in result.jobs if job.claimed_at), default=None)
    ended = max((verdict.created_at for verdict in result.verdicts if verdict.created_at), default=None)
    if began is None or ended is None or ended <= began:
        return None
    return len(result.verdicts) / (ended - began).total_seconds()


def checks(result: Result) -> Iterator[tuple[str, bool]]:
    """Statements about the run, and whether each is true."""
    answered = Counter(verdict.job_id for verdict in result.verdicts)
    once = set(answered) == {job.id for job in result.jobs} and set(answered.values()) == {1}
    yield f"each of {len(result.asked)} jobs has exactly one verdict", once and len(answered) == len(result.asked)
    found = {verdict.uri: verdict for verdict in result.verdicts}
    good = {uri: thing for uri, thing in result.asked.items() if isinstance(thing, Picture)}
    judged = (found[uri].outcome is Outcome.JUDGED for uri in good if uri in found)
    yield f"all {len(good)} images were judged, none rejected", all(judged)
    hashes = (found[uri].sha256 == picture.sha256 for uri, picture in good.items() if uri in found)
    yield "each verdict names the sha256 of the file that was made", all(hashes)
    bad = {uri: thing for uri, thing in result.asked.items() if isinstance(thing, Broken)}
    reasons = (found[uri].reason is thing.reason for uri, thing in bad.items() if uri in found)
    yield f"each of {len(bad)} broken ones was rejected for its own reason", all(reasons)
    yield "every verdict names the release", all(one.release == result.release for one in found.values())
