"""The demonstration step by step: images, release, S3, broker and worker, jobs, verdicts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker.client import Client
from code_worker.demo.images import Broken, Picture, broken_pictures, pictures, training_crops
from code_worker.demo.place import own_environment
from code_worker.demo.s3 import LocalS3
from code_worker.errors import CodeWorkerError
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.releases.toy import build_toy_release
from code_worker.settings import Settings, load_settings
from code_worker.store import jobs, migrate, workers
from code_worker.store.engine import Store, open_store
from code_worker.store.verdicts import stream
from code_worker.types import JobState, Verdict
from code_worker.worker.stack import Stack

if TYPE_CHECKING:
    from code_worker.demo.place import Place
    from code_worker.store.jobs import JobInfo

__all__ = ["BUCKET", "Result", "Step", "run_demo"]

BUCKET: Final = "demo-uploads"
_FORBIDDEN: Final = "demo-private"
_PAIRS: Final = range(24, 151)
_STALL_S: Final = 90.0
_POLL_S: Final = 0.1

Step = Callable[[str], AbstractContextManager[None]]
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(slots=True)
class Result:
    """What was asked and what came of it."""

    release: str
    trained_on: int
    asked: dict[str, Picture | Broken] = field(default_factory=dict)
    jobs: list[JobInfo] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)


def run_demo(place: Place, count: int, step: Step, progress: Progress) -> Result:
    """Runs everything in `place` under settings of its own; leaves files and database, and nothing running.

    `step(what)` surrounds each phase, `progress(what, total)` the long wait and yields what advances it.

    Raises:
        CodeWorkerError: something did not start, or a job did not end.
    """
    s3 = LocalS3()
    environment = {**place.environment, **s3.environment, "CODE_WORKER_S3__BUCKETS": f'["{BUCKET}"]'}
    with own_environment(environment), s3:
        settings = load_settings()
        with step(f"cut {count} images from two photographs"):
            good = list(pictures(count))
        with closing(open_store(settings.resolved_database_url)) as store:
            pairs = max(_PAIRS[0], min(_PAIRS[-1], count // 2))
            result = _install_release(place, settings, store, pairs, step)
            with step("put half of them into S3 and half into files, broken ones among them"):
                s3.wait_ready()
                _deliver(place, s3, good, result)
            _judge(place, store, result, step, progress)
            total = len(result.asked)
            result.jobs = store.run(lambda session: jobs.list_jobs(session, limit=total + 1), write=False)
            result.verdicts = list(stream(store))
    return result


def _install_release(place: Place, settings: Settings, store: Store, pairs: int, step: Step) -> Result:
    plugins = load_plugins(settings)
    with step(f"fit heads on {2 * pairs} other cuts, with an encoder that was never trained"):
        crops, labels = training_crops(pairs, settings.limits)
        build_toy_release(place.release, crops, labels, plugins)
    with step("create the database, import the release, promote it"):
        migrate.upgrade(store)
        registry = open_registry(settings, store=store, plugins=plugins)
        release = registry.add(place.release)
        registry.promote(release, by="demo")
    return Result(release, trained_on=len(labels))


def _deliver(place: Place, s3: LocalS3, good: Sequence[Picture], result: Result) -> None:
    """Puts every file where its URI says, shuffled so that broken ones stand between the others."""
    for bucket in (BUCKET, _FORBIDDEN):
        s3.put(bucket)
    asked: list[tuple[str, Picture | Broken]] = []
    for number, picture in enumerate(good):
        # In pairs, since every other picture is real.
        where = f"s3://{BUCKET}/{picture.name}" if number % 4 < 2 else str(place.images / picture.name)
        asked.append((where, picture))
    for broken in broken_pictures():
        bucket, directory = (BUCKET, place.images) if broken.allowed else (_FORBIDDEN, place.root)
        asked.append((f"s3://{bucket}/{broken.name}" if broken.in_s3 else str(directory / broken.name), broken))
    for uri, thing in asked:
        if thing.data is not None:
            _write(s3, uri, thing.data)
    random.Random(0).shuffle(asked)  # noqa: S311 - an order, not a secret
    result.asked = dict(asked)


def _write(s3: LocalS3, uri: str, data: bytes) -> None:
    if uri.startswith("s3://"):
        s3.put(uri.removeprefix("s3://"), data)
    else:
        Path(uri).write_bytes(data)


def _judge(place: Place, store: Store, result: Result, step: Step, progress: Progress) -> None:
    settings, total = load_settings(), len(result.asked)
    stack = Stack(settings, log_path=place.log)
    try:
        with step("start broker, scheduler and worker"):
            stack.start()
            _await_worker(store, result.release, place.log)
        with step(f"enqueue {total} jobs"), closing(Client(settings)) as client:
            client.enqueue_many(
                {"uri": uri, "metadata": {"source": thing.source}} for uri, thing in result.asked.items()
            )
        with step("judge them"), progress("judging", total) as advance:
            _follow(store, total, advance, place.log)
    finally:
        with step("stop"):
            stack.stop()


def _await_worker(store: Store, release: str, log: Path) -> None:
    deadline = time.monotonic() + _STALL_S
    while not any(
        worker.release == release
        for worker in store.run(lambda session: workers.alive(session, within_s=_STALL_S), write=False)
    ):
        if time.monotonic() > deadline:
            raise CodeWorkerError(f"the worker did not load the release within {_STALL_S:g} s; see {log}")
        time.sleep(_POLL_S)


def _follow(store: Store, total: int, advance: Callable[[int], None], log: Path) -> None:
    """Returns once every job is finished."""
    finished, last_change = 0, time.monotonic()
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
