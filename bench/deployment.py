"""The whole stack on loopback: Redis-protocol server, S3 endpoint, PostgreSQL, one worker process, a client."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from bench.contestants import label_of
from bench.postgres import ledger, postgres
from code_worker.client import Client
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import load_settings
from code_worker.store import jobs
from code_worker.store.engine import Store
from code_worker.types import JobState
from tests.servers import RedisServer, S3Server

__all__ = ["BUCKET", "Deployment", "deployed"]

BUCKET = "bench-images"
_PATIENCE_S = 300.0
_LOOK_S = 0.02
_ENDED = (JobState.DONE, JobState.QUARANTINED)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the worker's encoder loop had done at a moment (`time.time`)."""

    at: float
    busy_s: float
    crops: int
    streams: int


class Deployment:
    """What a producer sees of a stack that runs."""

    def __init__(self, client: Client, store: Store, s3: S3Server, samples: Path) -> None:
        self._client, self._store, self._s3, self._samples = client, store, s3, samples
        self._rounds = itertools.count()

    def upload(self, paths: Sequence[Path]) -> list[str]:
        """Puts files into the bucket; returns their URIs."""
        s3 = self._s3.client()
        for path in paths:
            s3.put_object(Bucket=BUCKET, Key=f"{path.parent.name}/{path.name}", Body=path.read_bytes())
        return [f"s3://{BUCKET}/{path.parent.name}/{path.name}" for path in paths]

    def judge(self, uris: Sequence[str]) -> tuple[float, list[int], float]:
        """Seconds from `enqueue_many` to the last verdict in SQL, labels (1 is fake), and the encoder's busy share.

        Raises:
            SystemExit: not within five minutes.
            RuntimeError: an image was rejected.
        """
        self._forget_embeddings()
        before = self._ended()
        began_at, began = time.time(), time.perf_counter()
        ids = self._client.enqueue_many(uris)
        while self._ended() - before < len(ids):
            if time.perf_counter() - began > _PATIENCE_S:
                raise SystemExit("the worker did not judge everything within five minutes")
            time.sleep(_LOOK_S)
        seconds = time.perf_counter() - began
        labels = [label_of(self._client.verdict(job)) for job in ids]
        return seconds, labels, self._busy_share(began_at, began_at + seconds)

    def _ended(self) -> int:
        counts = self._store.run(jobs.counts, write=False)
        return sum(count for state, count in counts.items() if state in _ENDED)

    def _forget_embeddings(self) -> None:
        """Bytes that were encoded in an earlier round would not be encoded again."""
        with self._store.engine.begin() as connection:
            connection.execute(text("DELETE FROM embeddings"))

    def _busy_share(self, start: float, end: float) -> float:
        """Share of the time between two moments in which the encoder's streams were at work, 0 to 1."""
        time.sleep(0.5)
        samples = [Sample(**json.loads(line)) for line in self._samples.read_text().splitlines()]
        first = max((one for one in samples if one.at <= start), key=lambda one: one.at, default=samples[0])
        last = min((one for one in samples if one.at >= end), key=lambda one: one.at, default=samples[-1])
        return (last.busy_s - first.busy_s) / (end - start) / last.streams


@contextmanager
def deployed(directory: Path, model: Path) -> Iterator[Deployment]:
    """A stack with the published form at `model` as its champion; its settings are this process's environment."""
    with ExitStack() as stack:
        redis, s3 = stack.enter_context(RedisServer()), stack.enter_context(S3Server())
        s3.client().create_bucket(Bucket=BUCKET)
        store = stack.enter_context(ledger(stack.enter_context(postgres()).new_database()))
        os.environ.update(
            {
                **s3.environment,
                "CODE_WORKER_S3__BUCKETS": json.dumps([BUCKET]),
                "CODE_WORKER_DATA_DIR": str(directory / "data"),
                "CODE_WORKER_ARTIFACTS": str(directory / "releases"),
                "CODE_WORKER_DATABASE_URL": store.url,
                "CODE_WORKER_BROKER_URL": redis.url,
                "CODE_WORKER_LOG_LEVEL": "warning",
            }
        )
        settings = load_settings()
        registry = open_registry(settings, store=store, plugins=load_plugins(settings))
        registry.promote(registry.import_(str(model)), by="bench")
        samples = directory / "samples"
        stack.enter_context(worker(samples))
        yield Deployment(stack.enter_context(closing(Client(settings))), store, s3, samples)


@contextmanager
def worker(samples: Path) -> Iterator[None]:
    """The worker's process, ended in order; it is ready once it has sampled its encoder."""
    samples.write_text("")
    process = subprocess.Popen([sys.executable, "-m", "bench.observed_worker", str(samples)])
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not samples.stat().st_size:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the worker did not start: status {process.returncode}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(60)
