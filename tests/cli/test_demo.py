from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from code_worker.cli.operations.demo import print_report
from code_worker.demo.first_act import Result
from code_worker.demo.toy_images import NEWCOMER
from tests.cli.conftest import Cli
from tests.demo.lessons import OLD, lesson
from tests.fork_server import CHILDREN_ENV, forking_python

LIMIT_S = 600


def demo(directory: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """Its retrain has one epoch instead of three; CI runs `make demo` as it is."""
    return subprocess.Popen(
        [forking_python(), "-m", "tests.demo.quick", "--directory", str(directory), *arguments],
        env={**os.environ, CHILDREN_ENV: "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(directory: Path) -> list[str]:
    """Command lines of processes that this demo started and that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(directory) in process.environ().get("CODE_WORKER_DATA_DIR", ""):
                found.append(" ".join(process.cmdline()))
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def counted(printed: str, title: str) -> dict[str, list[str]]:
    """Rows of one of the tables: first word → the others."""
    _, _, below = printed.partition(f"\n{title}")
    rows = below.partition("\n\n")[0].splitlines()[2:]
    return {row.split()[0]: row.split()[1:] for row in rows}


@pytest.mark.slow(reason="plays the whole demonstration, with a real retrain")
def test_the_demo_judges_everything_learns_a_newcomer_and_leaves_nothing_running(
    tmp_path: Path, bare_cli: Cli
) -> None:
    directory = tmp_path / "demo"
    # Somebody's own settings must not lead a demo to their database or buckets.
    foreign = {"CODE_WORKER_DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none", "CODE_WORKER_HEAD": "none"}
    running = demo(directory, "--images", "40", **foreign)
    printed, complaints = running.communicate(timeout=2 * LIMIT_S)
    assert (running.returncode, complaints) == (0, ""), printed
    assert "FAIL" not in printed
    assert printed.count("\nok   ") == 12
    check_first_act(printed)
    assert "\nThe gate: promoted\n  better on " in printed
    known = counted(printed, "What the gate could know")
    assert known.keys() == {"real", "toy-bilinear", "toy-checkerboard", "toy-nearest", "toy-sharpened", NEWCOMER}
    assert all(row[-2:] in (["points"], ["none"]) or row[-1] in {"points", "none"} for row in known.values())
    rows = re.findall(r"^(real|toy-[a-z]+)(, labelled)? +(\d+) +([\d.]+)% +([\d.]+)% ", printed, re.MULTILINE)
    counts = {source + labelled: int(number) for source, labelled, number, *_ in rows}
    assert counts == {
        "real": 60,
        "real, labelled": 120,
        "toy-bilinear": 5,
        "toy-checkerboard": 5,
        "toy-nearest": 5,
        "toy-sharpened": 5,
        NEWCOMER: 40,
        f"{NEWCOMER}, labelled": 120,
    }
    assert processes_of(directory) == []
    assert suggested(printed, bare_cli) == 8
    check_release(directory, tmp_path / "other", bare_cli)


def check_release(directory: Path, data: Path, cli: Cli) -> None:
    """What it leaves is a release that any other deployment takes in, as docs/celery.md says."""
    ran = cli("releases", "import", str(directory / "release"), "--promote", env={"CODE_WORKER_DATA_DIR": str(data)})
    assert ran.status == 0, ran.stderr
    assert "is the champion" in ran.stdout


def check_first_act(printed: str) -> None:
    """Of 40 images and the broken ones, each was judged or rejected as it must."""
    assert "mean nothing about images that a real generator made" in " ".join(printed.replace("│", " ").split())
    sources = counted(printed, "Verdicts by source")
    assert {name: int(row[0]) for name, row in sources.items()} == {
        "real": 20,
        "toy-bilinear": 5,
        "toy-checkerboard": 5,
        "toy-nearest": 5,
        "toy-sharpened": 5,
        "all": 40,
    }
    assert all(int(row[0]) == int(row[1]) + int(row[2]) for row in sources.values())
    reasons = counted(printed, "Rejections by reason")
    assert {name: int(row[0]) for name, row in reasons.items()} == {
        "empty": 2,
        "not_found": 2,
        "source_not_allowed": 2,
        "too_many_pixels": 1,
        "truncated": 2,
        "unsupported_format": 2,
    }
    assert re.search(r"\d+\.\d images/s through broker, worker and database", printed)


@pytest.mark.nightly
def test_the_demo_ends_after_the_first_act_if_asked_to(tmp_path: Path, bare_cli: Cli) -> None:
    directory = tmp_path / "demo"
    printed, complaints = demo(directory, "--images", "40", "--no-learning").communicate(timeout=LIMIT_S)
    assert complaints == ""
    assert "FAIL" not in printed
    assert printed.count("\nok   ") == 5
    check_first_act(printed)
    assert processes_of(directory) == []
    assert suggested(printed, bare_cli) == 5
    check_release(directory, tmp_path / "other", bare_cli)


def test_a_demo_whose_gate_rejects_says_that_nothing_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert not print_report(Result(OLD, 300, lesson=lesson("rejected")))
    printed = capsys.readouterr().out
    assert "The gate: rejected\n  why\n" in printed
    assert "nothing was judged again" in printed
    assert "FAIL the gate let the new release pass (rejected)" in printed


def suggested(printed: str, cli: Cli) -> int:
    """What the demo says to try next works; how many commands that is."""
    lines = re.findall(r"^  CODE_WORKER_DATA_DIR=(\S+) code-worker (.*)$", printed, re.MULTILINE)
    for data, command in lines:
        ran = cli(*command.split(), env={"CODE_WORKER_DATA_DIR": data})
        # The images lie between broken ones, which a scan tells by its status.
        assert ran.status == 0 or (command.startswith("scan") and ran.status == 1), (command, ran.stderr)
        assert ran.stdout
    return len(lines)


@pytest.mark.slow(reason="starts the whole stack")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_demo_that_is_interrupted_stops_what_it_started(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "demo"
    running = demo(directory, "--images", "8", "--no-learning")
    deadline = time.monotonic() + LIMIT_S
    while not any("code_worker.stack.worker_process" in one for one in processes_of(directory)):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(getattr(signal, name))
    printed, complaints = running.communicate(timeout=LIMIT_S)
    assert running.returncode == 1, printed
    assert "Aborted!" in complaints
    assert "Traceback" not in complaints
    assert processes_of(directory) == []


def test_a_directory_with_something_else_in_it_is_left_alone(bare_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    ran = bare_cli("demo", "--directory", str(tmp_path))
    assert ran.status == 2
    assert "holds something that no demo left" in ran.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
