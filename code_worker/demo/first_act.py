"""The demonstration step by step: images, release, S3, the running stack, jobs and verdicts; then what it learns."""

from __future__ import annotations

import http.client
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import quote

from code_worker.client import Client
from code_worker.demo.directory import own_environment
from code_worker.demo.second_act import (
    MORE_PAIRS,
    SETTINGS,
    Bar,
    Lesson,
    Stage,
    Step,
    await_jobs,
    await_release,
    learn,
)
from code_worker.demo.starter_release import build_starter_release
from code_worker.demo.toy_images import Broken, Picture, broken_pictures, crops_of, pictures, training_pictures
from code_worker.errors import CodeWorkerError, ConfigurationError
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.stack.up import Stack
from code_worker.store import jobs, migrate
from code_worker.store.engine import Store, open_store
from code_worker.store.verdicts import stream
from code_worker.system.processes import SUPERVISOR_ENV
from code_worker.types import Verdict

if TYPE_CHECKING:
    from code_worker.demo.directory import Place
    from code_worker.store.jobs import JobInfo

_HOST: Final = "127.0.0.1"
_START_S: Final = 120.0
_ANSWER_S: Final = 120.0
_STOP_S: Final = 5.0


class LocalS3:
    """The endpoint; starts in the background as soon as it is entered, and ends with its `with` block.

    Raises:
        ConfigurationError: moto is not installed.
    """

    def __init__(self) -> None:
        if find_spec("moto") is None:
            raise ConfigurationError("the demo needs a local S3 endpoint: pip install 'code-worker[demo]'")
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            # Free at this moment only: who takes it before the
            # server starts makes that end, and `wait_ready` says so.
            self.port = int(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Settings that lead a worker here; the credentials are made up, the server asks for none."""
        return {
            "CODE_WORKER_S3__ENDPOINT_URL": f"http://{_HOST}:{self.port}",
            "CODE_WORKER_S3__REGION": "us-east-1",
            "CODE_WORKER_S3__ACCESS_KEY_ID": "demo",
            "CODE_WORKER_S3__SECRET_ACCESS_KEY": "demo",
            "CODE_WORKER_S3__PATH_STYLE": "true",
        }

    def wait_ready(self) -> None:
        """Returns once the server answers.

        Raises:
            CodeWorkerError: it ended, or gave no answer in time.
        """
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise CodeWorkerError("the demo's S3 endpoint ended while it started")
            with suppress(OSError), socket.create_connection((_HOST, self.port), timeout=0.5):
                return
            time.sleep(0.05)
        raise CodeWorkerError(f"the demo's S3 endpoint gave no answer in {_START_S:g} s")

    def put(self, path: str, data: bytes = b"") -> None:
        """Creates `bucket`, or writes the object `bucket/key`.

        Raises:
            CodeWorkerError: the server refused.
        """
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=_ANSWER_S)
        try:
            connection.request("PUT", f"/{quote(path)}", body=data)
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise CodeWorkerError(f"the demo's S3 endpoint refused {path}: {answer.status}")

    def __enter__(self) -> Self:
        # The tie to this process, and a session of its own: Ctrl-C reaches the demo alone, which stops it in order.
        command = (sys.executable, "-m", "code_worker.system.processes", sys.executable, "-m", "moto.server")
        self._process = subprocess.Popen(
            [*command, "-H", _HOST, "-p", str(self.port)],
            env={**os.environ, SUPERVISOR_ENV: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


BUCKET: Final = "demo-uploads"
_FORBIDDEN: Final = "demo-private"
_PAIRS: Final = range(24, 151)


@dataclass(slots=True)
class Result:
    """Questions and answers of the first act; `lesson` is the second."""

    release: str
    trained_on: int
    asked: dict[str, Picture | Broken] = field(default_factory=dict)
    jobs: list[JobInfo] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    lesson: Lesson | None = None


def run_demo(place: Place, count: int, step: Step, bar: Bar, *, learning: bool = True) -> Result:
    """Runs everything in `place` under settings of its own; leaves files and database, and nothing running.

    `step(what)` surrounds each phase, `bar(what, total)` a long wait, and yields what advances it. Without
    `learning` it ends after the first act.

    Raises:
        CodeWorkerError: something did not start, or a job did not end.
    """
    s3 = LocalS3()
    environment = {**place.environment, **s3.environment, **SETTINGS, "CODE_WORKER_S3__BUCKETS": f'["{BUCKET}"]'}
    with own_environment(environment), s3:
        settings = load_settings()
        pairs = _PAIRS[-1] if learning else max(_PAIRS[0], min(_PAIRS[-1], count // 2))
        more = MORE_PAIRS if learning else 0
        with step(f"cut {count} images from two photographs, and {2 * (pairs + more)} others to learn from"):
            good, others = list(pictures(count)), list(training_pictures(pairs + more))
        learned = others[: 2 * pairs]
        with closing(open_store(settings.resolved_database_url)) as store:
            result = _install_release(place, settings, store, learned, step)
            with step("put half of them into S3 and half into files, broken ones among them"):
                s3.wait_ready()
                _deliver(place, s3, good, result)
            with _running(place, store, result.release, step) as running, closing(Client(running)) as client:
                stage = Stage(place, running, store, client)
                _judge(stage, result, step, bar)
                if learning:
                    result.lesson = learn(stage, others, step, bar)
    return result


def _install_release(
    place: Place, settings: Settings, store: Store, learned: Sequence[Picture], step: Step
) -> Result:
    plugins = load_plugins(settings)
    with step(f"fit heads on these {len(learned)}, with the toy encoder that comes along"):
        build_starter_release(place.release, *crops_of(learned, settings.limits), plugins)
    with step("create the database, import the release, promote it"):
        migrate.upgrade(store)
        registry = open_registry(settings, store=store, plugins=plugins)
        release = registry.add(place.release)
        registry.promote(release, by="demo")
    return Result(release, trained_on=len(learned))


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


@contextmanager
def _running(place: Place, store: Store, release: str, step: Step) -> Iterator[Settings]:
    """The stack, its worker ready; yields settings that know its broker."""
    stack = Stack(load_settings(), log_path=place.log)
    try:
        with step("start broker, scheduler, trainer and worker"):
            stack.start()
            await_release(store, release, place.log)
        yield stack.settings
    finally:
        with step("stop"):
            stack.stop()


def _judge(stage: Stage, result: Result, step: Step, bar: Bar) -> None:
    total = len(result.asked)
    with step(f"enqueue {total} jobs"):
        stage.client.enqueue_many(
            {"uri": uri, "metadata": {"source": thing.source}} for uri, thing in result.asked.items()
        )
    with step("judge them"), bar("judging", total) as advance:
        await_jobs(stage.store, total, advance, stage.place.log)
    result.jobs = stage.store.run(lambda session: jobs.list_jobs(session, limit=total + 1), write=False)
    result.verdicts = list(stream(stage.store))
