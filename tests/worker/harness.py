"""A deployment on loopback: real servers, a promoted toy release, worker processes that can be killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
from PIL import Image

from code_worker.client import Client
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.store.engine import Store, open_store
from code_worker.types import Verdict
from tests.fork_server import ADDRESS_ENV, ForkedProcess
from tests.patience import LIMIT_S, polls


def wait_until(condition: Callable[[], Any], limit_s: float, what: str) -> Any:
    """The first true value of `condition`; fails with `what` when the time is up, see `polls`."""
    for _ in polls(limit_s):
        if value := condition():
            return value
    raise AssertionError(f"not within {limit_s} s: {what}")


def decided(client: Client, ids: Sequence[str], limit_s: float = LIMIT_S) -> list[Verdict]:
    """The jobs' verdicts as they are once all have one; a look begins where the last one stopped."""
    waited = list(ids)

    def all_are_there() -> bool:
        while waited and client.verdict(waited[0]):
            del waited[0]
        return not waited

    wait_until(all_are_there, limit_s, f"verdicts of {len(ids)} jobs")
    return [verdict for job in ids if (verdict := client.verdict(job))]


def jpeg(seed: int, size: int = 240) -> bytes:
    """A small photograph-like image, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


@dataclass
class Deployment:
    """Settings as environment, shared by the test process and its workers."""

    environment: dict[str, str]
    log_path: Path
    workers: list[WorkerProcess] = field(default_factory=list)
    opened: list[Client | Store] = field(default_factory=list)
    _read: int = 0
    _logged: list[dict[str, Any]] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        saved = dict(os.environ)
        os.environ.update(self.environment)
        try:
            return load_settings()
        finally:
            os.environ.clear()
            os.environ.update(saved)

    def client(self) -> Client:
        """A client that is closed with the deployment."""
        self.opened.append(client := Client(self.settings))
        return client

    def store(self) -> Store:
        """A store that is closed with the deployment."""
        self.opened.append(store := open_store(self.settings.resolved_database_url))
        return store

    def worker(
        self, *arguments: str, module: str = "code_worker.stack.worker_process", **extra: str
    ) -> WorkerProcess:
        command = [sys.executable, "-m", module, *arguments]
        process = WorkerProcess(command, {**os.environ, **self.environment, **extra}, self.log_path)
        self.workers.append(process)
        return process

    def log(self) -> list[dict[str, Any]]:
        """What the workers logged, as far as it is JSON."""
        if self.log_path.exists():
            with self.log_path.open("rb") as stream:
                stream.seek(self._read)
                # The last line may still be being written.
                *lines, rest = stream.read().split(b"\n")
                self._read = stream.tell() - len(rest)
            self._logged += [json.loads(line) for line in lines if line.startswith(b'{"')]
        return self._logged

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.log() if event.get("event") == name]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for each in self.opened:
            each.close()


class WorkerProcess:
    """A process with its children; all of them end with the test."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log_path: Path) -> None:
        self._log = log_path.open("ab")
        self.process = start(command, environment, self._log)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def terminate(self, limit_s: float = LIMIT_S) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)

    def kill(self) -> None:
        children = self.children()
        self.process.kill()
        self.process.wait(LIMIT_S)
        for child in children:
            if child.is_running():
                child.kill()
        self._log.close()


def start(
    command: Sequence[str], environment: Mapping[str, str], output: BinaryIO
) -> subprocess.Popen[bytes] | ForkedProcess:
    """A process that writes to the file; `python -m …` is forked off a process that has imported the modules."""
    if ADDRESS_ENV in os.environ and list(command[:2]) == [sys.executable, "-m"]:
        with Path(os.devnull).open("rb") as nothing:
            streams = (nothing.fileno(), output.fileno(), output.fileno())
            return ForkedProcess(command[2], command[3:], env=environment, streams=streams)
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def environment_in(directory: Path, database_url: str, broker_url: str) -> dict[str, str]:
    """Settings of a deployment that keeps its data below `directory` and reads images in `files` there."""
    (directory / "files").mkdir(exist_ok=True)
    return {
        "CODE_WORKER_DATA_DIR": str(directory / "data"),
        "CODE_WORKER_DATABASE_URL": database_url,
        "CODE_WORKER_BROKER_URL": broker_url,
        "CODE_WORKER_ARTIFACTS": str(directory / "releases"),
        "CODE_WORKER_FILES__ROOTS": f'["{directory / "files"}"]',
        "CODE_WORKER_LOG_FORMAT": "json",
    }


def promote_release(deployment: Deployment, directory: Path) -> str:
    """Imports a release directory and makes it champion."""
    settings = deployment.settings
    registry = open_registry(settings, store=deployment.store(), plugins=load_plugins(settings))
    release = registry.import_(str(directory))
    registry.promote(release, by="test")
    return release
