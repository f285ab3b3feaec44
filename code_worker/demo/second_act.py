"""The second act: a toy generator that the champion misses, labels for some of its images, and a retrain."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker.demo.toy_images import NEWCOMER, REAL, Picture, newcomer_pictures
from code_worker.errors import CodeWorkerError
from code_worker.publisher import Publisher
from code_worker.store import jobs, releases, workers
from code_worker.store.learning import image_groups, runs
from code_worker.store.releases import CHAMPION
from code_worker.store.verdicts import RescoreFilter, VerdictFilter, stream
from code_worker.types import JobState
from code_worker.wire import RETRAIN, TRAIN_QUEUE
from code_worker.worker.judging.rescore_run import rescore

if TYPE_CHECKING:
    from code_worker.client import Client
    from code_worker.demo.directory import Place
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.store.learning.runs import Run
    from code_worker.store.releases import AliasMove
    from code_worker.types import Verdict

_STALL_S: Final = 180.0
_POLL_S: Final = 0.1

Progress = Callable[[int], None]
"""Advances a bar by so much."""
Bar = Callable[[str, int], AbstractContextManager[Progress]]
"""`bar(what, total)` surrounds a long wait."""
Step = Callable[[str], AbstractContextManager[None]]
"""`step(what)` surrounds a phase."""


def await_release(store: Store, release: str, log: Path) -> None:
    """Returns once a worker judges with the release.

    Raises:
        CodeWorkerError: none does in time.
    """
    deadline = time.monotonic() + _STALL_S
    # The champion's alias says what should judge; only a worker's own word says that it does.
    while not any(
        worker.release == release
        for worker in store.run(lambda session: workers.alive(session, within_s=_STALL_S), write=False)
    ):
        if time.monotonic() > deadline:
            raise CodeWorkerError(f"the worker did not load the release within {_STALL_S:g} s; see {log}")
        time.sleep(_POLL_S)


def await_jobs(store: Store, total: int, advance: Progress, log: Path, *, before: int = 0) -> None:
    """Returns once every job is finished, `before` of `total` having been already.

    Raises:
        CodeWorkerError: none was for a long time.
    """
    finished, last_change = before, time.monotonic()
    while finished < total:
        counts = store.run(jobs.counts, write=False)
        now = counts[JobState.DONE] + counts[JobState.QUARANTINED]
        if now > finished:
            advance(now - finished)
            finished, last_change = now, time.monotonic()
        elif time.monotonic() - last_change > _STALL_S:
            left = total - finished
            raise CodeWorkerError(f"{left} of {total} jobs are not finished, none in {_STALL_S:g} s; see {log}")
        time.sleep(_POLL_S)


def await_run(store: Store, advance: Progress, log: Path) -> Run:
    """The one run of this database, once it has ended; advances with its epochs.

    Raises:
        CodeWorkerError: none begins, or it gives no sign of life for a long time.
    """
    epochs, seen, last_change = 0, None, time.monotonic()
    while True:
        run = next(iter(store.run(lambda session: runs.list_runs(session, limit=1), write=False)), None)
        if run is not None:
            measured = len(store.run(partial(runs.metrics, run_id=run.id), write=False))
            advance(measured - epochs)
            epochs = measured
            if run.finished_at is not None:
                return run
        # No limit on the whole: a slow machine trains for long, and is told from a dead one by its signs of life.
        if (sign := run and (run.stage, run.heartbeat_at)) != seen:
            seen, last_change = sign, time.monotonic()
        elif time.monotonic() - last_change > _STALL_S:
            what = "began no run" if run is None else f"gave no sign of life in stage {run.stage}"
            raise CodeWorkerError(f"the trainer {what} for {_STALL_S:g} s; see {log}")
        time.sleep(_POLL_S)


SETTINGS: Final[Mapping[str, str]] = {
    # So many threads everywhere, since sums in another order are other figures; and none that waits takes a core.
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CODE_WORKER_DEVICE": "cpu",
    "CODE_WORKER_TRAINING__EPOCHS": "3",
    "CODE_WORKER_TRAINING__STEPS_PER_EPOCH": "24",
    "CODE_WORKER_TRAINING__RECORDS": "32",
    "CODE_WORKER_TRAINING__LEARNING_RATE": "1e-3",
    "CODE_WORKER_TRAINING__NEW_SHARE": "0.3",
    "CODE_WORKER_TRAINING__KEEP": "1",
    "CODE_WORKER_TRAINING__LOADER_PROCESSES": "0",
    # So few images that are only measured on cannot exclude the two points that are the default.
    "CODE_WORKER_GATE__MAX_REGRESSION": "0.1",
}
"""A retrain of one minute or two, and a gate that allows more to be lost than by default, as the report says."""
MORE_PAIRS: Final = 200
"""Pairs of images that are labelled besides, and that nothing learned from before: what may be lost shows on them."""
_APPEARING: Final = 320
_LABELLED: Final = 120
_AFTERWARDS: Final = 40
_EVER: Final = datetime(2000, 1, 1, tzinfo=UTC)
# Everybody's demonstration splits its labels alike; chosen so that a fifth of each kind falls into the hold-out and a
# tenth is for validation. An installation's own is drawn at random.
_SECRET: Final = (1074).to_bytes(32, "big")


@dataclass(slots=True)
class Lesson:
    """The labels, the run that learned from them, and the verdicts on the same images before and after.

    Attributes:
        labelled: jobs of the second act whose images were labelled, every other one real.
        taught: images that were labelled in all.
        run: the retrain as it ended.
        before: the first champion's verdicts by job, those of rejected images left out.
        afterwards: what the running worker said of images that came after the run; none unless it promoted.
        ledger: every verdict there is in the end, superseded ones too.
        moves: of the champion's alias, the last first.
    """

    labelled: frozenset[str]
    taught: int
    run: Run
    before: Mapping[str, Verdict]
    afterwards: Sequence[Verdict] = ()
    ledger: Sequence[Verdict] = ()
    moves: Sequence[AliasMove] = ()


def learn(stage: Stage, learned: Sequence[Picture], step: Step, bar: Bar) -> Lesson:
    """Plays the second act on a running stack; `learned` is what is labelled of the generators that are known.

    Raises:
        CodeWorkerError: a job or the run did not end.
    """
    with step(f"{NEWCOMER} appears: judge {_APPEARING} new images, every other one its own"):
        every = list(newcomer_pictures(_APPEARING + _AFTERWARDS))
        appeared = stage.judge(every[:_APPEARING])
    before = {verdict.job_id: verdict for verdict in stream(stage.store) if verdict.label is not None}
    with step(f"label {_LABELLED} of its images, as many real ones, and {len(learned)} of before"):
        labelled = stage.label(appeared, learned)
    with step("retrain: the trainer trains, fits the heads and asks the gate"):
        run = stage.retrain(bar)
    lesson = Lesson(labelled, len(labelled) + len(learned), run, before)
    if run.state == "promoted":
        _follow(stage, every[_APPEARING:], lesson, step, bar)
    lesson.ledger = list(stream(stage.store, VerdictFilter(live_only=False)))
    lesson.moves = stage.store.run(lambda session: releases.moves(session, CHAMPION), write=False)
    return lesson


def _follow(stage: Stage, later: Sequence[Picture], lesson: Lesson, step: Step, bar: Bar) -> None:
    with step("the running worker takes the new champion over"):
        await_release(stage.store, lesson.run.candidate or "", stage.place.log)
    with step(f"judge {len(later)} images that come afterwards"):
        lesson.afterwards = [verdict for job in stage.judge(later) if (verdict := stage.client.verdict(job))]
    total = len(lesson.before)
    with step(f"judge all {total} of before again"), bar("judging again", total) as advance:
        rescore(stage.settings, stage.store, RescoreFilter(_EVER), progress=advance)


@dataclass(frozen=True, slots=True)
class Stage:
    """A running stack, and what is asked of it."""

    place: Place
    settings: Settings
    store: Store
    client: Client

    def judge(self, some: Sequence[Picture]) -> dict[str, Picture]:
        """Writes pictures as files and has them judged; returns them by job."""
        before = sum(self.store.run(jobs.counts, write=False).values())
        for picture in some:
            (self.place.images / picture.name).write_bytes(picture.data)
        ids = self.client.enqueue_many(
            {"uri": str(self.place.images / picture.name), "metadata": {"source": picture.source}} for picture in some
        )
        await_jobs(self.store, before + len(some), lambda _: None, self.place.log, before=before)
        return dict(zip(ids, some, strict=True))

    def label(self, appeared: Mapping[str, Picture], learned: Sequence[Picture]) -> frozenset[str]:
        """Labels some of what was judged, by its job, and what was learned from; returns those jobs."""
        reals = [job for job, picture in appeared.items() if picture.source == REAL]
        fakes = [job for job, picture in appeared.items() if picture.source != REAL]
        chosen = [*reals[:_LABELLED], *fakes[:_LABELLED]]
        self.store.run(lambda session: image_groups.begin_with(session, _SECRET))
        for job in chosen:
            self._say(job, appeared[job])
        for picture in learned:
            path = self.place.learned / picture.name
            path.write_bytes(picture.data)
            self._say(str(path), picture)
        return frozenset(chosen)

    def _say(self, target: str, picture: Picture) -> None:
        if picture.source == REAL:
            self.client.label(target, "real", by="demo")
        else:
            self.client.label(target, "fake", generator=picture.source, by="demo")

    def retrain(self, bar: Bar) -> Run:
        """Asks the trainer for a retrain, as `code-worker retrain --enqueue` does, and waits for its end."""
        with closing(Publisher.for_producer(self.settings)) as publisher:
            publisher.call(RETRAIN, TRAIN_QUEUE, arguments={"by": "demo"})
        with bar("epochs", int(SETTINGS["CODE_WORKER_TRAINING__EPOCHS"])) as advance:
            return await_run(self.store, advance, self.place.log)
