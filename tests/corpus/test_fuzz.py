"""Whatever is done to a good file, it ends with pixels or a reason: no crash, no error without a type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.faults.rows import Seen, row
from tests.fork_server import forking_python

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = ROOT / "plugins" / "jpeg" / "code_worker_jpeg"
NIGHT_S = 600.0


def fuzz(what: str, seed: int, seconds: float, **environment: str) -> dict[str, Any]:
    """What a process of its own says of so many seconds of changed files."""
    python = sys.executable if environment else forking_python()
    command = [python, "-m", "tests.corpus.fuzz", what, "--seed", str(seed), "--seconds", str(seconds)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process whose extension is built with AddressSanitizer."""
    package = tmp_path_factory.mktemp("asan") / "code_worker_jpeg"
    shutil.copytree(EXTENSION, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    include = sysconfig.get_paths()["include"]
    flags = ["-shared", "-fPIC", "-g", "-O1", "-std=c11", "-fsanitize=address", "-fno-omit-frame-pointer"]
    target = str(package / "_region.abi3.so")
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, *flags, f"-I{include}", str(package / "_region.c"), "-o", target, "-ldl"], check=True)
    command = [compiler, "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    path = os.pathsep.join([str(package.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "PYTHONPATH": path,
        # The interpreter's own arenas would hide a read behind an object.
        "PYTHONMALLOC": "malloc",
    }


def note(seen: Seen, found: dict[str, Any]) -> None:
    seen(files=found["files"], slowest_s=found["slowest_s"], exits=0, untyped_errors=0)


def test_changed_files_give_pixels_or_a_reason() -> None:
    found = fuzz("whole", seed=20_407, seconds=9)
    assert {"judged", "corrupt", "truncated", "unsupported_format", "too_many_pixels"} <= set(found["ends"])


def test_the_region_decoder_touches_no_memory_but_its_own(watched: dict[str, str]) -> None:
    found = fuzz("region", seed=20_407, seconds=6, **watched)
    assert set(found["ends"]) == {"decoded", "declined"}


def test_address_sanitizer_is_at_work(watched: dict[str, str], tmp_path: Path) -> None:
    # A reader of one byte too many, or all of the above would pass without being looked at.
    code = "import ctypes; data = ctypes.create_string_buffer(8); ctypes.memmove(data, data, 64)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | watched, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    where = "import code_worker_jpeg._region as region; print(region.__file__)"
    command[-1] = where
    used = subprocess.run(command, env=os.environ | watched, capture_output=True, text=True, check=True).stdout
    assert Path(used.strip()).parent.parent == Path(watched["PYTHONPATH"].split(os.pathsep)[0])


@pytest.mark.nightly
@row("fuzz", injection="good files with bits, bytes and pieces changed, 10 min", expected="0 exits, 0 untyped errors")
def test_ten_minutes_of_changed_files(fault_seed: int, seen: Seen) -> None:
    note(seen, fuzz("whole", fault_seed, NIGHT_S))


@pytest.mark.nightly
@row(
    "fuzz-region",
    injection="changed JPEGs and any region, the extension under AddressSanitizer, 10 min",
    expected="0 exits, 0 reports",
)
def test_ten_minutes_of_regions_under_address_sanitizer(watched: dict[str, str], fault_seed: int, seen: Seen) -> None:
    note(seen, fuzz("region", fault_seed, NIGHT_S, **watched))
