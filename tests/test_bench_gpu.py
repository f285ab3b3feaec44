"""The measuring of accelerators, as far as a machine without one can be measured."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from code_worker import __file__ as package
from code_worker.types import EMBEDDING_TOLERANCE
from tests.fork_server import forking_python

ROOT = Path(package).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [forking_python(), "-m", "bench.gpu", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_a_gpu_that_is_not_there_is_one_line_and_status_2() -> None:
    done = run("--device", "cuda")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("bench.gpu: device 'cuda' is not there")
    assert "Traceback" not in done.stderr


def test_a_tiny_run_on_a_cpu_measures_every_part(tmp_path: Path) -> None:
    done = run(
        "--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["precision"], row["batch"]) for row in found["forward"]] == [("fp32", 8)]
    assert found["forward"][0]["images_per_s"]["median"] > 0
    assert found["forward"][0]["largest_error"] < EMBEDDING_TOLERANCE
    assert found["matrix_tflops"]["fp32"]["median"] > 0
    assert found["end_to_end"]["images"] == 24
    assert found["end_to_end"]["images_per_s"] > 0
    assert found["profile"]
    assert "| fp32 | plain | 8 |" in (tmp_path / "gpu.md").read_text()
