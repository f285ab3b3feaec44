from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from code_worker.client import Client
from code_worker.settings import load_settings
from code_worker.types import Outcome
from tests.embedded.processes import CLI, Up, until
from tests.fork_server import forking_python


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (240, 260, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"CODE_WORKER_DATA_DIR": str(tmp_path / "data"), "CODE_WORKER_FILES__ROOTS": json.dumps([str(tmp_path)])}


@pytest.fixture
def up(tmp_path: Path, env: dict[str, str]) -> Iterator[Up]:
    made = Up(tmp_path / "data", tmp_path / "output", forked=True, **env)
    yield made
    made.kill()


def _run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [forking_python(), *CLI[1:], *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def _kill(up: Up, part: str) -> None:
    for process in psutil.Process(up.process.pid).children():
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if any(part in word for word in process.cmdline()):
                process.kill()


@pytest.mark.slow(reason="starts the whole stack, and a worker twice")
def test_up_judges_whatever_was_enqueued_and_whatever_of_it_dies(
    up: Up, env: dict[str, str], images: list[Path], toy_release_dir: Path
) -> None:
    up.wait_ready()
    with closing(Client(load_settings(data_dir=up.data_dir))) as client:
        early = client.enqueue_many([str(path) for path in images[:3]])  # nothing can judge yet
        promoted = _run(env, "releases", "import", str(toy_release_dir), "--promote")
        assert promoted.returncode == 0, promoted.stderr
        until(lambda: all(client.verdict(job) for job in early), 240)
        _kill(up, "valkey-server")
        _kill(up, "code_worker.stack.worker_process")
        late = client.enqueue_many([str(path) for path in images[3:]])  # accepted, whatever the broker does just now
        until(lambda: all(client.verdict(job) for job in late), 240)
        assert {verdict.outcome for job in early + late if (verdict := client.verdict(job))} == {Outcome.JUDGED}

    found = _run(env, "doctor", "--json", "broker", "database", "release", "workers", "jobs")
    assert found.returncode == 0, found.stdout
    assert {"workers", "release", "broker"} <= {
        row["name"] for row in map(json.loads, found.stdout.splitlines()) if row["status"] == "ok"
    }
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(120) == 0, up.text()
