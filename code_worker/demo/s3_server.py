"""A local S3 endpoint for the demonstration: moto's server, a child process with its data in memory."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from typing import Final, Self
from urllib.parse import quote

from code_worker.errors import CodeWorkerError, ConfigurationError
from code_worker.system.processes import SUPERVISOR_ENV

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
