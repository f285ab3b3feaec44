from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from code_worker.stack.supervisor import Backoff, Child, Supervisor
from tests.embedded.processes import child, is_gone, lines, until

QUICK = Backoff(first_s=0.05, max_s=0.2, healthy_s=30)
SLEEPER = "note({log!r}, str(os.getpid()))\ntime.sleep(600)"


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor(grace_s=120, backoff=QUICK)
    yield made
    made.stop()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_a_child_that_is_killed_is_started_again_under_another_owner(supervisor: Supervisor, log: Path) -> None:
    body = f"note({str(log)!r}, os.environ['CODE_WORKER_OWNER'])\ntime.sleep(600)"
    supervisor.add(child("one", body))
    supervisor.start()
    until(lambda: len(lines(log)) == 1)
    os.kill(supervisor.pids()["one"], signal.SIGKILL)
    until(lambda: len(lines(log)) == 2)
    first, second = lines(log)
    assert ":one:" in first
    assert first != second


def test_a_death_is_reported_with_its_owner_and_status(supervisor: Supervisor, log: Path) -> None:
    deaths: list[tuple[str, int]] = []
    body = f"note({str(log)!r}, os.environ['CODE_WORKER_OWNER'])\ntime.sleep(600)"
    supervisor.add(child("one", body, on_death=lambda owner, status: deaths.append((owner, status))))
    supervisor.start()
    until(lambda: lines(log))
    os.kill(supervisor.pids()["one"], signal.SIGKILL)
    until(lambda: deaths)
    assert deaths == [(lines(log)[0], -signal.SIGKILL)]


def test_what_children_print_is_appended_to_the_log_through_restarts(log: Path) -> None:
    supervisor = Supervisor(grace_s=120, backoff=QUICK, log_path=log)
    supervisor.add(child("one", "print('out', flush=True)\nprint('err', file=sys.stderr, flush=True)"))
    supervisor.start()
    try:
        until(lambda: lines(log).count("out") >= 2 and lines(log).count("err") >= 2)
    finally:
        supervisor.stop()


def test_a_report_that_hangs_delays_no_restart(supervisor: Supervisor, log: Path) -> None:
    supervisor.add(child("one", f"note({str(log)!r}, 'up')\nsys.exit(1)", on_death=lambda *_: time.sleep(600)))
    supervisor.start()
    until(lambda: len(lines(log)) >= 3)


def test_a_child_that_ends_well_but_uninvited_is_started_again(supervisor: Supervisor, log: Path) -> None:
    deaths: list[int] = []
    body = f"note({str(log)!r}, 'up')"
    supervisor.add(child("one", body, on_death=lambda _, status: deaths.append(status)))
    supervisor.start()
    until(lambda: len(lines(log)) >= 2)
    assert deaths == []


def test_the_wait_before_a_restart_doubles_to_a_limit_and_starts_anew_after_health() -> None:
    backoff = Backoff(first_s=0.5, max_s=5, healthy_s=30)
    waits, wait = [], 0.0
    for lived_s in (0, 1, 1, 1, 1, 1, 29, 30, 0):
        wait = backoff.next(wait, lived_s)
        waits.append(wait)
    assert waits == [0.5, 1, 2, 4, 5, 5, 5, 0.5, 1]


def test_a_wrong_configuration_is_not_tried_again_and_stops_all(supervisor: Supervisor, log: Path) -> None:
    supervisor.add(child("good", SLEEPER.format(log=str(log))))
    supervisor.start()
    until(lambda: lines(log))
    supervisor.add(child("wrong", f"note({str(log)!r}, 'wrong')\nsys.exit(2)"))
    assert supervisor.wait() == 2
    assert lines(log)[1:] == ["wrong"]
    assert is_gone(int(lines(log)[0]))


def test_a_program_that_does_not_exist_counts_as_wrong_configuration(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.add(Child("ghost", (str(tmp_path / "no-such-program"),)))
    supervisor.start()
    assert supervisor.wait() == 2


def test_children_stop_one_after_the_other_in_reverse_order(supervisor: Supervisor, log: Path) -> None:
    for name in ("first", "second"):
        body = (
            f"signal.signal(signal.SIGTERM, lambda *_: (note({str(log)!r}, '{name} asked'), time.sleep(0.3), "
            f"note({str(log)!r}, '{name} done'), sys.exit(0)))\n"
            f"note({str(log)!r}, 'ready')\nwhile True: time.sleep(1)"
        )
        supervisor.add(child(name, body))
    supervisor.start()
    until(lambda: len(lines(log)) == 2)
    assert supervisor.stop() == 0
    assert lines(log)[2:] == ["second asked", "second done", "first asked", "first done"]


def test_a_child_that_ignores_the_request_is_killed_with_what_it_started(log: Path) -> None:
    supervisor = Supervisor(grace_s=0.3, backoff=QUICK)
    body = (
        "import subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"note({str(log)!r}, f'{{os.getpid()}} {{grandchild.pid}}')\nwhile True: time.sleep(1)"
    )
    supervisor.add(child("stubborn", body))
    supervisor.start()
    until(lambda: lines(log))
    assert supervisor.stop() == 0
    for pid in lines(log)[0].split():
        until(lambda pid=pid: is_gone(int(pid)))


def _supervising(log: Path, body: str) -> subprocess.Popen[bytes]:
    """A process of its own that supervises one child with the signals of a command line."""
    program = (
        "import sys\nfrom tests.embedded.processes import child\n"
        "from code_worker.stack.supervisor import Supervisor\n"
        f"supervisor = Supervisor(grace_s=600)\nsupervisor.add(child('one', {body!r}))\nsys.exit(supervisor.run())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2], start_new_session=True)
    until(lambda: lines(log))
    return process


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_when_the_supervisor_is_killed_its_child_goes_too(log: Path, system: str) -> None:
    body = SLEEPER.format(log=str(log))
    if sys.platform == "linux" and system == "darwin":  # plays the other system: no help from the kernel
        body = (
            "import ctypes\nctypes.CDLL(None).prctl(1, 0)\nsys.platform = 'darwin'\n"
            f"os.environ['CODE_WORKER_SUPERVISOR_PID'] = str(os.getppid())\ndie_with_parent()\n{body}"
        )
    process = _supervising(log, body)
    process.kill()
    process.wait(120)
    until(lambda: is_gone(int(lines(log)[0])))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_child_in_order(log: Path, number: signal.Signals) -> None:
    body = (
        f"signal.signal(signal.SIGTERM, lambda *_: (note({str(log)!r}, 'asked'), sys.exit(0)))\n"
        f"note({str(log)!r}, str(os.getpid()))\nwhile True: time.sleep(1)"
    )
    process = _supervising(log, body)
    process.send_signal(number)
    assert process.wait(120) == 0
    assert lines(log)[1:] == ["asked"]
    assert is_gone(int(lines(log)[0]))


def test_ctrl_c_in_the_terminal_reaches_the_supervisor_alone(log: Path) -> None:
    body = (
        f"signal.signal(signal.SIGINT, lambda *_: note({str(log)!r}, 'interrupted'))\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (note({str(log)!r}, 'asked'), sys.exit(0)))\n"
        f"note({str(log)!r}, str(os.getpid()))\nwhile True: time.sleep(1)"
    )
    process = _supervising(log, body)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 0
    assert lines(log)[1:] == ["asked"]


def test_a_second_ctrl_c_does_not_wait_for_the_child(log: Path) -> None:
    body = (
        f"signal.signal(signal.SIGTERM, lambda *_: note({str(log)!r}, 'asked'))\n"
        f"note({str(log)!r}, str(os.getpid()))\nwhile True: time.sleep(1)"
    )
    process = _supervising(log, body)
    process.send_signal(signal.SIGINT)
    until(lambda: len(lines(log)) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0  # far below the ten minutes of grace
    assert is_gone(int(lines(log)[0]))
