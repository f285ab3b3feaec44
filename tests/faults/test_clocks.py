"""A worker whose clock is wrong by an hour: leases are the database's, so nothing is judged twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.deployment import FaultDeployment
from tests.faults.rows import Seen, row
from tests.servers import RedisServer
from tests.worker.harness import wait_until

# Found by every Python that starts with this directory on its path; kombu and the doctor ask `time.time`.
_SHIFT = """
import os, time
_real = time.time
time.time = lambda: _real() + float(os.environ["SHIFTED_BY_S"])
"""


def _shifted(directory: Path, seconds: int, environment: dict[str, str]) -> dict[str, str]:
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(_SHIFT)
    path = f"{directory}:{environment.get('PYTHONPATH', '')}:{':'.join(sys.path)}"
    return {"PYTHONPATH": path, "SHIFTED_BY_S": str(seconds)}


def _doctor(deployment: FaultDeployment, extra: dict[str, str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "code_worker", "doctor", "--json"],
        env={**deployment.environment, **extra},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.nightly
@row(
    "F11",
    injection="a worker's clock {hours:+d} h, beside one whose clock is right",
    expected="one verdict, judged once; doctor fails above 60 s",
)
@pytest.mark.parametrize("hours", [1, -1])
def test_a_wrong_clock_judges_nothing_twice(
    deploy: Callable[..., FaultDeployment],
    migrated_postgres_url: str,
    slow_jobs: dict[str, str],
    redis_server: RedisServer,
    tmp_path: Path,
    seen: Seen,
    hours: int,
) -> None:
    deployment = deploy(migrated_postgres_url, **slow_jobs)
    shifted = _shifted(tmp_path / "shifted", 3600 * hours, deployment.environment)
    deployment.worker(**shifted)
    deployment.worker()
    deployment.started(2)
    ids = [job for uri in deployment.images(24) for job in deployment.enqueue([uri], metadata={"seconds": 8})]
    wait_until(lambda: deployment.decided(ids) == len(ids), 120, "all verdicts")
    assert deployment.operations().executed_again == 0
    clocks = [check for check in _doctor(deployment, shifted) if check["name"] == "clock"]
    assert {check["status"] for check in clocks} == {"fail"}
    again = sum(event["jobs"] for event in deployment.events("duplicate_skipped"))
    seen(jobs=len(ids), judged_again=0, delivered_again=again, doctor="fails")
