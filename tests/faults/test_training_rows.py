"""Trainers that are killed at any moment of a retrain: the run ends all the same, once, and the champion is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.rows import Seen, row

ROOT = Path(__file__).resolve().parents[2]
STAGES = "snapshot train refit report gate promote"


@row(
    "F27",
    injection="SIGKILL of trainer and all below it at {kills} random moments of retrains, and in each stage of one",
    expected="each run goes on in the next process and ends by its own, none begins twice, the champion stays whole",
)
@pytest.mark.nightly
@pytest.mark.parametrize("kills", [20])
def test_a_trainer_that_is_killed_at_any_moment_ends_its_run_in_the_next_life(
    tmp_path: Path, kills: int, fault_seed: int, seen: Seen
) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench.crash", str(tmp_path / "place"), "--kills", str(kills)]
    command += ["--each", "5", "--stages", STAGES, "--seed", str(fault_seed), "--json", str(report)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = json.loads(report.read_text())
    assert [one["problems"] for one in rounds if one["problems"]] == []
    assert rounds[-1]["killed_in"] == STAGES.split()
    killed = Counter(stage for one in rounds for stage in one["killed_in"])
    assert killed.total() == kills + len(STAGES.split())
    seen(
        runs=len(rounds),
        kills=killed.total(),
        killed_in=", ".join(f"{stage} {count}" for stage, count in sorted(killed.items())),
        most_attempts=max(one["attempts"] for one in rounds),
        begun_twice=0,
        promoted=sum(one["state"] == "promoted" for one in rounds),
    )
