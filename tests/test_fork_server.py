"""Programs that are forked off a process which has imported everything: to a test they are like any other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fork_server import ADDRESS_ENV, CHILDREN_ENV, ForkedProcess, ForkServer, forking_python
from tests.patience import polls

REPORT = """
import os, sys, threading
print(os.environ["GREETING"], sys.argv[1:], os.getcwd(), "torch" in sys.modules, len(os.environ), flush=True)
print("to stderr", file=sys.stderr, flush=True)
threading.Thread(target=lambda: print("a thread's last word")).start()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def server() -> Iterator[None]:
    """One of the test's own, since the run may have none; it imports nothing before it is asked."""
    before = os.environ.get(ADDRESS_ENV)
    made = ForkServer(preloaded=("json",))
    yield
    made.close()
    if before is None:
        del os.environ[ADDRESS_ENV]
    else:
        os.environ[ADDRESS_ENV] = before


def run(directory: Path, code: str, *arguments: str) -> tuple[ForkedProcess, Path]:
    (directory / "program.py").write_text(code, encoding="utf-8")
    output = directory / "output"
    environment = {"PYTHONPATH": str(directory), "GREETING": "hello"}
    with Path(os.devnull).open("rb") as nothing, output.open("ab") as out:
        streams = (nothing.fileno(), out.fileno(), out.fileno())
        return ForkedProcess("program", arguments, env=environment, streams=streams), output


@pytest.mark.usefixtures("server")
def test_it_has_its_own_arguments_environment_directory_streams_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, output = run(tmp_path, REPORT, "3", "more")
    assert program.wait(120) == program.poll() == 3
    assert output.read_text().splitlines() == [
        f"hello ['3', 'more'] {tmp_path} False 2",
        "to stderr",
        "a thread's last word",
    ]


def test_a_python_in_a_path_with_a_space_is_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = tmp_path / "a place" / "python"
    spaced.parent.mkdir()
    spaced.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(spaced))
    monkeypatch.setenv(ADDRESS_ENV, "")
    server = ForkServer(preloaded=("json",))
    try:
        done = subprocess.run([server.python, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True)
        assert done.stdout == "42\n"
    finally:
        server.close()


@pytest.mark.usefixtures("server")
def test_clients_that_are_killed_while_they_ask_end_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = {"module": "", "code": "pass", "arguments": [], "env": {}, "directory": str(tmp_path), "bound": True}
    message = json.dumps(wanted | {"strict": False}).encode()
    with Path(os.devnull).open("r+b") as nothing:
        streams = [nothing.fileno()] * 3
        for said in (b"", message[:20], message):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(os.environ[ADDRESS_ENV])
                if said:
                    socket.send_fds(client, [len(message).to_bytes(4, "big")], streams)
                    client.sendall(said)
                    client.shutdown(socket.SHUT_RD)  # the server's answer finds nobody
    program, _ = run(tmp_path, "raise SystemExit(3)")
    assert program.wait(120) == 3


@pytest.mark.usefixtures("server")
def test_a_signal_reaches_it_and_its_status_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, output = run(tmp_path, "import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    for _ in polls():
        if "up" in output.read_text():
            break
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.01)
    assert program.poll() is None
    program.terminate()
    assert program.wait(120) == -signal.SIGTERM
    program.kill()  # it has ended: nobody else is hit


@pytest.mark.usefixtures("server")
def test_an_uncaught_error_is_printed_and_ends_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, output = run(tmp_path, "raise LookupError('nothing there')\n")
    assert program.wait(120) == 1
    assert output.read_text().endswith("LookupError: nothing there\n")


@pytest.mark.usefixtures("server")
def test_a_script_may_stand_in_for_a_program_and_passes_signals_on(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(7))\n"
        "print(sys.stdin.read(), flush=True)\n"
        "time.sleep(600)\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    code = (
        f"import sys; sys.path.insert(0, {root!r}); from tests.fork_server import run_as; sys.exit(run_as('program'))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as script:
        assert script.stdin is not None
        assert script.stdout is not None
        script.stdin.write(b"what was typed")
        script.stdin.close()
        assert script.stdout.readline() == b"what was typed\n"
        script.send_signal(signal.SIGINT)
        assert script.wait(120) == 7


CHILD = """
import signal, sys, time
if sys.argv[1:] == ["leaf"]:
    print(sys.executable, flush=True)
    time.sleep(600)
import os, subprocess
from code_worker.system.processes import SUPERVISOR_ENV
environment = {**os.environ, SUPERVISOR_ENV: str(os.getpid())}
with subprocess.Popen([sys.executable, "-m", "program", "leaf"], env=environment) as child:
    sys.exit(child.wait())
"""


@pytest.mark.usefixtures("server")
def test_what_a_forked_program_starts_is_forked_if_asked_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHILDREN_ENV, "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "program.py").write_text(CHILD, encoding="utf-8")
    with subprocess.Popen([forking_python(), "-m", "program"], stdout=subprocess.PIPE, cwd=tmp_path) as script:
        assert script.stdout is not None
        assert script.stdout.readline().decode().strip() == forking_python() != sys.executable
        script.kill()
        assert script.stdout.read() == b"", "everything that could still write has ended"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("last_words", "status", "printed"),
    [
        ("sys.exit('not like this')", 1, "not like this\nat exit\n"),
        ("sys.exit(None)", 0, "at exit\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT, "KeyboardInterrupt\nat exit\n"),
    ],
)
def test_it_ends_as_an_interpreter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: str, status: int, printed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    program, output = run(
        tmp_path, f"import atexit, os, signal, sys, time\natexit.register(print, 'at exit')\n{last_words}\n"
    )
    assert program.wait(120) == status
    assert output.read_text().endswith(printed)


@pytest.mark.usefixtures("server")
def test_warnings_are_errors_if_asked(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import warnings\nwarnings.warn('old')\nprint('went on')\n", encoding="utf-8"
    )
    for options, status in (([], 0), (["-W", "error"], 1)):
        command = [forking_python(), *options, "-m", "program"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=120)
        assert done.returncode == status
        assert done.stdout == b"" if status else b"went on\n"


@pytest.mark.usefixtures("server")
def test_the_server_outlives_copies_and_stand_ins_that_end_at_once(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for _ in range(10):
        command = [forking_python(), "-m", "program"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, env=environment) as script:
            assert script.stdout is not None
            os.kill(int(script.stdout.readline()), signal.SIGKILL)
            script.kill()
            assert script.stdout.read() == b""
