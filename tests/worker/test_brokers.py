"""Workers of an app whose Redis is one of several, behind Sentinel or at a socket: they judge, and nothing breaks."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from code_worker.types import Outcome
from code_worker.wire import QUEUES, SWEEP_QUEUE
from tests.patience import LIMIT_S
from tests.servers import ChildServer, RedisServer
from tests.worker.harness import Deployment, WorkerProcess, jpeg, wait_until


class SocketServer(RedisServer):
    """A server that also listens at a socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def command(self) -> list[str]:
        return [*super().command(), "--unixsocket", str(self.path)]


class Sentinel(ChildServer):
    """One sentinel, which knows one server by the name `theirs`."""

    def __init__(self, server: RedisServer, directory: Path) -> None:
        super().__init__()
        self._server = server
        self._file = directory / "sentinel.conf"
        self._file.write_text(
            f"port {self.port}\nbind 127.0.0.1\nsentinel monitor theirs 127.0.0.1 {server.port} 1\n", encoding="utf-8"
        )

    def command(self) -> list[str]:
        return [self._server.command()[0], str(self._file), "--sentinel"]


@pytest.fixture
def redis_server() -> Iterator[SocketServer]:
    # Not under pytest's directory: the path of a socket has a hundred characters at most.
    with tempfile.TemporaryDirectory(prefix="cw-") as directory, SocketServer(Path(directory) / "s") as server:
        yield server


@pytest.fixture(params=["several", "sentinel", "socket"])
def url(request: pytest.FixtureRequest, redis_server: SocketServer, tmp_path: Path) -> Iterator[str]:
    """The app's broker; producers reach the same server by TCP."""
    if request.param == "several":
        yield f"{redis_server.url};redis://127.0.0.1:1/0"
    elif request.param == "socket":
        yield f"redis+socket://{quote(str(redis_server.path))}"
    else:
        with Sentinel(redis_server, tmp_path) as sentinel:
            yield f"sentinel://127.0.0.1:{sentinel.port}"


def test_a_worker_judges_by_whatever_url_its_redis_has(
    url: str, deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    deployment = deploy(
        f"sqlite:///{tmp_path / 'db.sqlite'}",
        THEIRS_DIRECTORY=str(tmp_path),
        THEIRS_BROKER=url,
        CODE_WORKER_BROKER__KEY_PREFIX="null",
    )
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(1))
    command = [
        *(sys.executable, "-m", "celery", "-A", "tests.worker.foreign_app", "worker", "-l", "INFO"),
        *("--pool", "threads", "--concurrency", "1", "-Q", ",".join([*QUEUES, SWEEP_QUEUE])),
    ]
    worker = WorkerProcess(command, {**os.environ, **deployment.environment}, deployment.log_path)
    deployment.workers.append(worker)
    client = deployment.client()
    job = client.enqueue(str(tmp_path / "files" / "a.jpg"))
    verdict = wait_until(lambda: client.verdict(job), LIMIT_S, f"our verdict: {deployment.log_path.read_text()}")
    assert verdict.outcome is Outcome.JUDGED
    assert worker.terminate() == 0
    said = deployment.log_path.read_text()
    assert ("broker_without_our_transport" in said) is (not url.startswith("redis://"))
    assert "background_part" not in said
