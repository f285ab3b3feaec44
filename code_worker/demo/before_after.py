"""What the second act found: the same images judged before and after, and whether everything is as it must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.demo.artefacts import NEWCOMER
from code_worker.demo.images import REAL
from code_worker.types import Label

if TYPE_CHECKING:
    from code_worker.demo.learning import Lesson
    from code_worker.types import Verdict

__all__ = ["GroupRow", "by_group", "lesson_checks"]

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
    shares = []
    for source in (REAL, NEWCOMER):
        jobs = [job for job, verdict in lesson.before.items() if verdict.metadata["source"] == source]
        shares.append(_right(verdicts, [job for job in jobs if job not in lesson.labelled]))
    return sum(shares) / len(shares)
