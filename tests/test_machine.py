"""Clocks that a stopped process and a wrongly set machine do not mislead."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from code_worker.settings import LimitSettings, Settings
from code_worker.system.machine import (
    ServerClock,
    decode_memory,
    library_threads,
    memory_limit,
    uptime_s,
    usable_cores,
    usable_memory,
    wait_for,
)
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


def described(root: Path, groups: str, **files: str) -> Path:
    """A root whose `/proc` and `/sys` say so."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


_V1 = "4:memory:/pod/box\n2:cpu,cpuacct:/pod/box\n1:name=systemd:/x\n0::/"


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ("0::/", {}, None, None),
        ("0::/", {"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ("0::/", {"cpu.max": "50000 100000", "memory.max": "536870912"}, 1, 536870912),
        ("0::/pod/box", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "100000 100000", "cpu.max": "max"}, 1, None),
        ("0::/pod/box", {"pod/box/memory.max": "300", "pod/memory.max": "200", "memory.max": "max"}, None, 200),
        ("0::/of/the/machine", {"cpu.max": "10000 100000", "memory.max": "100"}, 1, 100),
        ("0::/../../elsewhere", {"memory.max": "100"}, None, 100),
        (_V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
        (_V1, {"cpu/pod/cpu.cfs_quota_us": "100000", "cpu/pod/cpu.cfs_period_us": "100000"}, 1, None),
        (_V1, {"memory/pod/box/memory.limit_in_bytes": "9223372036854771712"}, None, None),
        (_V1, {"memory/memory.limit_in_bytes": "1000", "memory/pod/box/memory.limit_in_bytes": "2000"}, None, 1000),
        ("not a line of cgroups", {"cpu.max": "10000 100000"}, None, None),
        ("0::/", {"cpu.max": "garbage", "memory.max": ""}, None, None),
    ],
)
def test_the_limits_of_a_container_are_those_of_every_group_around_it(
    groups: str, files: dict[str, str], cores: int | None, memory: int | None, tmp_path: Path
) -> None:
    root = described(tmp_path, groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert usable_cores(root) == (cores or len(os.sched_getaffinity(0)))
    assert memory_limit(root) == memory


def test_part_of_a_core_is_rounded_up_and_never_above_what_there_is(tmp_path: Path) -> None:
    there = len(os.sched_getaffinity(0))
    for quota, cores in (("10000", 1), ("110000", min(2, there)), ("6400000", there)):
        root = described(tmp_path, "0::/", **{"sys/fs/cgroup/cpu.max": f"{quota} 100000"})
        assert usable_cores(root) == cores


def test_a_container_decodes_in_a_quarter_of_its_memory_at_most(tmp_path: Path) -> None:
    assert decode_memory(tmp_path) == 280_000_000
    for limit, share in ((2**30, 2**28), (2**34, 280_000_000), (3, 1)):
        root = described(tmp_path, "0::/", **{"sys/fs/cgroup/memory.max": str(limit)})
        assert decode_memory(root) == share
    assert Settings().limits.max_decode_bytes == decode_memory()
    assert LimitSettings(max_decode_bytes=5).max_decode_bytes == 5


def test_a_limit_above_the_memory_that_is_there_is_none(tmp_path: Path) -> None:
    there = psutil.virtual_memory().total
    assert usable_memory(tmp_path) == there
    for limit in (2**20, there + 2**20):
        root = described(tmp_path, "0::/", **{"sys/fs/cgroup/memory.max": str(limit)})
        assert usable_memory(root) == min(limit, there)


def test_libraries_of_a_new_process_are_told_of_a_quota_and_else_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert library_threads(tmp_path) == {}
    root = described(tmp_path, "0::/", **{"sys/fs/cgroup/cpu.max": "100000 100000"})
    assert set(library_threads(root).values()) == ({"1"} if len(os.sched_getaffinity(0)) > 1 else set())
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert library_threads(root) == {}, "somebody chose a number"
