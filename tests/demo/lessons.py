"""Second acts as they may have gone, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from code_worker.demo.second_act import Lesson
from code_worker.demo.toy_images import NEWCOMER
from code_worker.store.learning.runs import Run
from code_worker.store.releases import AliasMove
from code_worker.types import Label, Outcome, Provenance, Verdict

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OLD, NEW = "r-old", "r-new"
FAKE, REAL = Label.FAKE, Label.REAL
ASKED = (
    ("real", "toy-nearest", *["real"] * 2, *[NEWCOMER] * 4),
    (REAL, FAKE, REAL, FAKE, REAL, REAL, FAKE, REAL),
    (REAL, FAKE, REAL, REAL, FAKE, FAKE, FAKE, REAL),
)
LABELLED = frozenset({"job-3", "job-7"})


def verdict(job: int, source: str, label: Label, release: str, **more: Any) -> Verdict:
    return Verdict(
        f"job-{job}",
        f"/images/{job}",
        Outcome.JUDGED,
        label,
        id=f"{release}/{job}",
        metadata={"source": source},
        provenance=Provenance(release=release),
        **more,
    )


def moves(*releases: str) -> list[AliasMove]:
    return [AliasMove(1, "champion", release, None, None, NOW, "demo", "") for release in releases]


def run(state: str) -> Run:
    return Run(
        id="run",
        kind="retrain",
        state=state,
        stage="gate",
        by="demo",
        attempts=1,
        owner=None,
        token=1,
        config={},
        snapshot_id=None,
        base_release=OLD,
        candidate=NEW,
        reasons=["why"],
        report={},
        created_at=NOW,
        heartbeat_at=NOW,
        finished_at=NOW,
    )


def lesson(state: str = "promoted", after: Sequence[Label] = ASKED[2]) -> Lesson:
    old = [verdict(job, source, label, OLD) for job, (source, label) in enumerate(zip(*ASKED[:2], strict=True))]
    made = Lesson(LABELLED, 8, run(state), {one.job_id: one for one in old}, ledger=old, moves=moves(OLD))
    if state == "promoted":
        again = [
            verdict(job, source, label, NEW, revision=1, supersedes=one.id)
            for job, (source, label, one) in enumerate(zip(ASKED[0], after, old, strict=True))
        ]
        later = [verdict(8, NEWCOMER, FAKE, NEW)]
        made.afterwards, made.ledger, made.moves = later, [*old, *again, *later], moves(NEW, OLD)
    return made
