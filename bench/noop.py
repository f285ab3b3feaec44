"""What the worker costs without its model: messages of 64 through a worker process whose encoder does nothing.

    python -m bench.noop [--images 20000] [--rounds 3] [--distinct 1] [--json FILE]
    python -m bench.noop --memory 50000

Three contestants, each a process of its own that empties a queue of messages filled beforehand: `celery` runs an
empty task, `judge` fetches, hashes, decodes, encodes and scores the 64 images and writes nothing, `ledger` is the
whole task with its claims and verdicts in PostgreSQL. The source hands out `--distinct` images of 224² from memory,
the encoder and the head answer with a constant. A message is decoded once per distinct image: one image, the default,
leaves what the machinery costs by itself. `--memory` runs `ledger` and prints the process's memory as it goes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from bench.photographs import HELD_OUT, Album
from bench.postgres import ledger, postgres
from bench.rounds import alternate, compared, print_table, rows_of, write_json
from code_worker.moderation.judge import Judge
from code_worker.moderation.policy import PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.runtime import Runtime
from code_worker.publisher import Publisher
from code_worker.settings import Settings
from code_worker.stack.worker_process import consume
from code_worker.store import jobs
from code_worker.store.ids import uuid7
from code_worker.types import EMBEDDING_DIM, Fetched, Job
from code_worker.wire import MAX_JOBS_PER_MESSAGE, MODERATE, NORMAL, chunks
from code_worker.worker.app import create_app, host_of
from code_worker.worker.intake import judge_jobs, take_message
from code_worker.worker.judging.node import Node
from code_worker.worker.judging.runtimes import Runtimes
from tests.servers import RedisServer

CONTESTANTS = ("celery", "judge", "ledger")
BARS_PER_S = {"judge": 20_000, "ledger": 8_000}
SAMPLES = 10


class Memory:
    """A source that hands out the same few images whatever it is asked for."""

    def __init__(self, distinct: int) -> None:
        album, rng = Album(HELD_OUT), np.random.default_rng(0)
        self._images = [Fetched(_jpeg(album.piece(rng, 224)[1])) for _ in range(distinct)]

    def fetch(self, uri: str) -> Fetched:
        """The image that the number at the end of the URI picks."""
        return self._images[int(uri.rpartition("/")[2]) % len(self._images)]

    def close(self) -> None:
        """Nothing is open."""


class NoEncoder:
    """An embedder that answers at once, the same for every crop."""

    failure: BaseException | None = None
    busy = False

    def __init__(self) -> None:
        self._row = np.full(EMBEDDING_DIM, 0.5, np.float32)

    def submit(self, crop: NDArray[np.uint8], priority: int = 4, turn: int = 0) -> Future[NDArray[np.float32]]:
        """A future that is done."""
        future: Future[NDArray[np.float32]] = Future()
        future.set_result(self._row)
        return future

    def close(self) -> None:
        """Nothing runs."""


class NoHead:
    """A head that calls everything real."""

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """`(n,)` times 0.25."""
        return np.full(len(embeddings), 0.25)


def runtime() -> Runtime:
    """A release without a model."""
    return Runtime("no-op", "a" * 64, "b" * 64, NoEncoder(), {"none": NoHead()}, {"none": "c" * 64}, "none")  # type: ignore[dict-item]  # scoring is all that is asked of a head here


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG")
    return written.getvalue()


def main() -> None:
    """Runs the rounds, or one child."""
    parser = argparse.ArgumentParser(prog="bench.noop")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--distinct", type=int, default=1)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--memory", type=int, metavar="IMAGES")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        Worker(chosen.child, chosen.images, chosen.distinct).run()
        return
    with postgres() as server, RedisServer() as broker, tempfile.TemporaryDirectory() as data:

        def measure(name: str, images: int) -> dict[str, Any]:
            # A database each: a sweeper would publish jobs that another contestant left.
            url = server.new_database()
            settings = Settings(data_dir=Path(data), database_url=url, broker_url=broker.url)
            return measured(settings, name, images, chosen.distinct)

        if chosen.memory:
            found = measure("ledger", chosen.memory)
            print_table(("images", "MB"), found["memory_mb"])
            print(f"growth: {found['growth_percent']} %")
        else:
            rates = alternate(
                list(chosen.contestants), chosen.rounds, lambda name: float(measure(name, chosen.images)["per_s"])
            )
            found = judged_rates(rates)
    write_json(chosen.json, found)


def judged_rates(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Each contestant beside Celery's ceiling, with its bar."""
    first = next(iter(rates))
    found = compared(rates, first, {})
    for name, bar in BARS_PER_S.items():
        if name in found:
            found[name] |= {"bar": bar, "met": found[name]["per_s"]["median"] >= bar}
            found[name].setdefault("ours_is_times", None)
    titles = ("what", "who", "images/s", f"{first} is times", "bar")
    print_table(titles, list(rows_of("messages of 64", found)))
    return found


def measured(settings: Settings, name: str, images: int, distinct: int) -> dict[str, Any]:
    """Fills the queue, lets a child empty it, and returns what the child says."""
    fill(settings, images)
    command = [sys.executable, "-m", "bench.noop", "--child", name, "--images", str(images)]
    environment = {
        **os.environ,
        "CODE_WORKER_DATA_DIR": str(settings.data_dir),
        "CODE_WORKER_DATABASE_URL": settings.resolved_database_url,
        "CODE_WORKER_BROKER_URL": settings.resolved_broker_url,
        "CODE_WORKER_LOG_LEVEL": "warning",
    }
    done = subprocess.run(
        [*command, "--distinct", str(distinct)], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def fill(settings: Settings, images: int) -> None:
    """Accepts so many jobs and publishes them in messages of 64."""
    with ledger(settings.resolved_database_url) as store, closing(Publisher.for_producer(settings)) as publisher:
        for some in chunks(range(images), 1024):
            ids = store.run(partial(jobs.accept, jobs=[jobs.NewJob(f"s3://memory/{number}") for number in some]))
            for group in chunks(ids):
                publisher.publish(NORMAL, group)


class Worker:
    """A worker process that ends when it has seen so many images."""

    def __init__(self, name: str, images: int, distinct: int) -> None:
        self._settings = Settings()
        self._images = images
        self._app = create_app(self._settings)
        self._lock = threading.Lock()
        self._seen = 0
        self._began: tuple[float, int] | None = None
        self._ended = 0.0
        self._memory: list[tuple[int, float]] = []
        self._source = Memory(distinct)
        work = {"celery": self._nothing, "judge": self._judge, "ledger": self._ledger}[name]()
        self._app.tasks[MODERATE].run = self._counted(work)

    def run(self) -> None:
        """Consumes, then prints what it measured as a line of JSON."""
        consume(self._app, [NORMAL], self._settings.worker.concurrency, self._settings, name="noop")
        began, before = self._began or (0.0, 0)
        warm = [mb for seen, mb in self._memory if seen >= self._images // SAMPLES]
        growth = (warm[-1] / warm[0] - 1) * 100
        found = {
            "per_s": (self._seen - before) / (self._ended - began),
            "memory_mb": self._memory,
            "growth_percent": round(growth, 2),
        }
        print(json.dumps(found), flush=True)

    def _counted(self, work: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
        step = max(MAX_JOBS_PER_MESSAGE, self._images // SAMPLES)

        def task(message: dict[str, Any]) -> None:
            work(message)
            with self._lock:
                before, self._seen = self._seen, self._seen + len(message["jobs"])
                # What is loaded and connected for the first messages is not what a message costs.
                if self._began is None and self._seen >= self._images // SAMPLES:
                    self._began = time.perf_counter(), self._seen
                if before // step != self._seen // step or before < self._images <= self._seen:
                    self._memory.append((self._seen, round(psutil.Process().memory_info().rss / 2**20, 2)))
                if before < self._images <= self._seen:
                    self._ended = time.perf_counter()
                    os.kill(os.getpid(), signal.SIGTERM)

        return task

    def _nothing(self) -> Callable[[dict[str, Any]], object]:
        return lambda message: message["jobs"]

    def _judge(self) -> Callable[[dict[str, Any]], object]:
        pool = PriorityPool(self._settings.worker.fetch_threads)
        judge, book, used = (
            Judge(sources=self._source, pool=pool, limits=self._settings.limits),
            PolicyBook(),
            runtime(),
        )

        def work(message: dict[str, Any]) -> object:
            made = [Job(job_id, f"s3://memory/{place}") for place, job_id in enumerate(message["jobs"])]
            judged = judge.judge(made, used, book)
            if len(judged.verdicts) != len(made):
                raise SystemExit(f"{len(judged.faults)} images were not judged")
            return judged

        return work

    def _ledger(self) -> Callable[[dict[str, Any]], object]:
        host = host_of(self._app)
        node = Node(self._settings, host.store())
        node.runtimes = Runtimes(lambda: "no-op", lambda _: runtime())
        node._guarded._sources = self._source  # noqa: SLF001 - images from memory
        node.follow()
        return lambda message: judge_jobs(node, take_message(node.store, message, uuid7()))


if __name__ == "__main__":
    main()
