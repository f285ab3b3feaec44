from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PROGRAM = "/opt/code_worker/venv/bin/code-worker"
Unit = dict[str, dict[str, list[str]]]


def parse(text: str) -> Unit:
    """Sections of a unit file: directive → values, in order.

    Raises:
        ValueError: a line that is neither a section, a directive nor a comment.
    """
    unit: Unit = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in text.splitlines():
        if not line or line.startswith(("#", ";")):
            continue
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif section and (match := re.fullmatch(r"([A-Z]\w+)=(.*)", line)):
            unit[section][match[1]].append(match[2])
        else:
            raise ValueError(line)
    return unit


def read(path: Path) -> Unit:
    return parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_unit_has_the_three_sections_and_one_value_each(path: Path) -> None:
    unit = read(path)
    assert set(unit) == {"Unit", "Service", "Install"}
    assert [name for values in unit.values() for name, found in values.items() if len(found) != 1] == []


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_unit_is_restarted_for_ever_but_not_on_wrong_settings(path: Path) -> None:
    unit = read(path)
    assert unit["Service"]["Restart"] == ["always"]
    assert unit["Service"]["RestartSec"] == ["3"]
    assert unit["Unit"]["StartLimitIntervalSec"] == ["0"]
    assert unit["Service"]["RestartPreventExitStatus"] == ["2"]
    assert unit["Service"]["KillSignal"] == ["SIGTERM"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_unit_runs_unprivileged_in_a_sealed_system(path: Path) -> None:
    service = read(path)["Service"]
    assert service["User"] == ["code_worker"]
    assert service["NoNewPrivileges"] == ["yes"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["CapabilityBoundingSet"] == [""]


def test_worker_trainer_and_beat_each_have_a_unit() -> None:
    assert [read(path)["Service"]["ExecStart"] for path in UNITS] == [
        [f"{PROGRAM} {command}"] for command in ("beat", "trainer", "worker")
    ]


def test_systemd_accepts_the_units_where_it_is_installed(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    stand_in = shutil.which("true")
    for path in UNITS:
        copy = tmp_path / path.name
        copy.write_text(path.read_text(encoding="utf-8").replace(PROGRAM, str(stand_in)), encoding="utf-8")
        assert str(stand_in) in copy.read_text(encoding="utf-8")
        if analyze:
            done = subprocess.run([analyze, "verify", str(copy)], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_unit_would_be_noticed() -> None:
    with pytest.raises(ValueError, match="Restart always"):
        parse("[Service]\nRestart always\n")
