"""Clocks that a stopped process and a wrongly set machine do not mislead."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from code_worker.machine import ServerClock, uptime_s, wait_for
from tests.fault_s3 import BODY, ETAG, FaultServer
from tests.fork_server import forking_python
from tests.patience import LIMIT_S, polls

_FETCHES = """
import os, sys
from code_worker.errors import TransientError
from code_worker.images.s3 import S3Source
from code_worker.settings import S3Settings
settings = S3Settings(
    endpoint_url=sys.argv[1], region="us-east-1", path_style=True, buckets=("bucket",), access_key_id="key",
    secret_access_key="secret", object_timeout_s=2, read_timeout_s=120, max_attempts=1, body_attempts=1,
)
print(os.getpid(), flush=True)
try:
    print(len(S3Source(settings, max_bytes=10**6, connections=2).fetch("s3://bucket/a.jpg").data))
except TransientError as error:
    print(error)
"""


def test_a_download_of_a_process_that_was_stopped_is_not_late() -> None:
    go = threading.Event()

    def answers_when_told(handler) -> None:  # type: ignore[no-untyped-def]
        handler.head(200, {"Content-Length": str(len(BODY)), "ETag": ETAG})
        assert go.wait(LIMIT_S)
        handler.wfile.write(BODY)

    with FaultServer(answers_when_told) as server:
        command = [forking_python(), "-c", _FETCHES, server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            pid = int(child.stdout.readline())
            _until(lambda: server.requests)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(2.5)  # longer than the object may take
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.3)
            go.set()
            assert child.stdout.read().strip() == str(len(BODY))


def _until(condition: Callable[[], object]) -> None:
    for _ in polls():
        if condition():
            return
    raise AssertionError("it did not come about")


def test_a_wait_ends_with_its_event_or_its_time() -> None:
    event = threading.Event()
    began = time.monotonic()
    assert not wait_for(event, 0.6)
    assert time.monotonic() - began >= 0.6
    threading.Timer(0.1, event.set).start()
    assert wait_for(event, LIMIT_S)
    assert wait_for(event, 0)


def test_a_clock_that_is_set_moves_no_servers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ServerClock()
    assert clock.now_s() == pytest.approx(time.time(), abs=5)
    clock.agree(1000.0)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    began = uptime_s()
    assert 1000.0 <= clock.now_s() <= 1005.0 + uptime_s() - began
