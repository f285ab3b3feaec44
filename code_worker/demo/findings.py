"""Results of a demonstration: figures counted from its database, and whether everything is as it must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.demo.toy_images import NEWCOMER, REAL, Broken, Picture
from code_worker.types import Label, Outcome

if TYPE_CHECKING:
    from code_worker.demo.first_act import Result
    from code_worker.demo.second_act import Lesson
    from code_worker.types import Verdict


@dataclass(frozen=True, slots=True)
class SourceRow:
    """Verdicts on the images of one source; `right` is the share that got the right label."""

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


_MISSED: Final = 0.75
_GAIN: Final = 0.15


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Images of one source: the share judged rightly by the first champion, and by the one that learned, if any."""

    group: str
    images: int
    before: float
    after: float | None


def by_group(lesson: Lesson) -> list[GroupRow]:
    """Real images first, the newcomer last; those that were labelled apart from the others."""
    groups: dict[tuple[bool, bool, str, bool], list[str]] = {}
    for job, verdict in lesson.before.items():
        source = verdict.metadata["source"]
        groups.setdefault((source != REAL, source == NEWCOMER, source, job in lesson.labelled), []).append(job)
    after = _after(lesson)
    return [
        GroupRow(
            f"{source}, labelled" if labelled else source,
            len(jobs),
            _right(lesson.before, jobs),
            _right(after, jobs) if after else None,
        )
        for (_, _, source, labelled), jobs in sorted(groups.items())
    ]


def _right(verdicts: Mapping[str, Verdict], jobs: list[str]) -> float:
    """Share of these jobs whose verdict is what the image is."""
    found = [verdicts[job] for job in jobs if job in verdicts]
    return float(np.mean([one.label is _truth(one) for one in found])) if found else 0.0


def _truth(verdict: Verdict) -> Label:
    return Label.REAL if verdict.metadata["source"] == REAL else Label.FAKE


def _after(lesson: Lesson) -> dict[str, Verdict]:
    """The verdicts that took the place of others, by job."""
    return {verdict.job_id: verdict for verdict in lesson.ledger if verdict.supersedes is not None}


def lesson_checks(lesson: Lesson) -> Iterator[tuple[str, bool]]:
    """Statements about the second act, and whether each is true; without a new champion the last ones are missing."""
    before = _of_newcomer(lesson, lesson.before)
    yield f"{NEWCOMER} was missed at first: balanced accuracy {before:.2f}", before <= _MISSED
    promoted = lesson.run.state == "promoted"
    yield f"the gate let the new release pass ({lesson.run.state})", promoted
    if not promoted:
        return
    moved = [move.release_id for move in lesson.moves]
    yield "the champion moved once", moved == [lesson.run.candidate, lesson.run.base_release]
    judged_by = {verdict.release for verdict in lesson.afterwards}
    yield f"the running worker judged {len(lesson.afterwards)} more with it", judged_by == {lesson.run.candidate}
    again, kept = _after(lesson), {verdict.id: verdict for verdict in lesson.ledger}
    pointing = {job: verdict.supersedes for job, verdict in again.items()}
    yield (
        f"each of {len(lesson.before)} verdicts was given again, and the new one names the old",
        pointing == {job: verdict.id for job, verdict in lesson.before.items()},
    )
    yield "the old verdicts stay as they were", all(kept.get(old.id) == old for old in lesson.before.values())
    after = _of_newcomer(lesson, again)
    yield (
        f"{NEWCOMER} is found now, on images that nobody labelled: balanced accuracy {after:.2f}",
        after - before >= _GAIN,
    )


def _of_newcomer(lesson: Lesson, verdicts: Mapping[str, Verdict]) -> float:
    """Balanced accuracy over the newcomer's images and the real ones, those that were labelled left out."""
    # The mean of the two classes' shares, so that it does not matter of which there are more.
    shares = []
    for source in (REAL, NEWCOMER):
        jobs = [job for job, verdict in lesson.before.items() if verdict.metadata["source"] == source]
        shares.append(_right(verdicts, [job for job in jobs if job not in lesson.labelled]))
    return sum(shares) / len(shares)
