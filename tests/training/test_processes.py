"""Two processes under torchrun: they train as one, end together, and stop together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from code_worker.encoder.weights import read_weights
from tests.fork_server import ForkedProcess, forking_python
from tests.training.jobs import small_job, write_small_job
from tests.worker.harness import start

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(directory: Path) -> subprocess.Popen[bytes] | ForkedProcess:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHON_EXEC": forking_python(),  # what torchrun starts
    }
    with (directory / "log.txt").open("ab") as log:
        return start(
            [*TORCHRUN, "-m", "code_worker.training.fitting.training_process", str(directory)], environment, log
        )


def ended(process: subprocess.Popen[bytes] | ForkedProcess, directory: Path) -> int:
    try:
        return process.wait(600)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        pytest.fail((directory / "log.txt").read_text())


def test_two_processes_write_one_result_and_end_together_after_being_stopped(tmp_path: Path) -> None:
    directory = write_small_job(tmp_path / "job", small_job(epochs=8, steps_per_epoch=4, patience=1000, records=4))
    process = torchrun(directory)
    deadline = time.monotonic() + 600
    while not (directory / "metrics.jsonl").exists():
        assert process.poll() is None, (directory / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ended(process, directory)
    stopped = json.loads((directory / "progress.json").read_text())
    assert not (directory / "result").exists()
    assert stopped["step"] < 32
    assert ended(torchrun(directory), directory) == 0, (directory / "log.txt").read_text()
    read_weights(directory / "result")
    epochs = [json.loads(line)["epoch"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 9))
    assert '"event": "training_resumed"' in (directory / "log.txt").read_text()
