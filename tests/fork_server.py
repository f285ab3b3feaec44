"""Starts our programs from a process that has imported what they import, so that a test does not wait for it.

Importing torch, SQLAlchemy, Celery and the rest takes a worker several seconds of processor time, and the suite
starts hundreds of programs. One process per test run imports them once; `ForkedProcess` asks it for a copy of itself,
which goes on as `python -m MODULE` would: with its own process id, environment, directory, streams and signals, only
that its parent is the server and that the modules are there. `forking_python()` stands in for Python where a program
is started by another: by pytest-xdist, by torchrun, and, with `CHILDREN_ENV`, by our own supervisors. It passes
signals on, dies with its supervisor, and its copy dies with it. `make faults`, and tests that look at the processes
of a supervisor, start every program from nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from code_worker.system.processes import die_with_parent

__all__ = ["ADDRESS_ENV", "CHILDREN_ENV", "ForkServer", "ForkedProcess", "forking_python", "run_as"]

ADDRESS_ENV = "FORK_SERVER_ADDRESS"
CHILDREN_ENV = "FORK_SERVER_CHILDREN"
"""Where it is set, what a forked program starts with `sys.executable` is forked too."""
PRELOADED = (
    *("torch", "tests.described_s3", "psycopg", "redbeat", "alembic.command", "kombu.transport.redis"),
    *("celery.worker.worker", "celery.concurrency.thread", "sqlalchemy.dialects.sqlite"),
    *("sqlalchemy.dialects.postgresql.psycopg", "code_worker.store.migrate", "code_worker.images.region"),
    *(
        "code_worker.worker.judging.node",
        "code_worker.worker.app",
        "code_worker.worker.tasks",
        "code_worker.images.s3",
    ),
    *(
        "code_worker.encoder.openvino_engine",
        "code_worker.encoder.engines",
        "code_worker.encoder.loop",
        "code_worker_heads.linear",
        "code_worker_heads.knn",
    ),
    # What tests import besides. Nothing that keeps what it read in the environment: huggingface_hub does, and with it
    # timm and transformers.
    *("scipy.stats", "sklearn.linear_model", "sklearn.svm", "matplotlib.figure"),
    # The first optimiser that torch makes imports this, for four seconds of processor time.
    "torch._dynamo",
)


# The line for a shell is a string to Python: behind `#!` the path of an interpreter could have no space.
_PYTHON = """#!/bin/sh
'''exec' "{python}" -IS "$0" "$@"
' '''
import sys
sys.path.insert(0, {root!r})
from tests.fork_server import run_as
at = next(number for number, word in enumerate(sys.argv) if word in ("-c", "-m"))
strict = sys.argv[1:3] == ["-W", "error"]
option, what, *sys.argv[1:] = sys.argv[at:]
sys.exit(run_as("", what, strict=strict) if option == "-c" else run_as(what, strict=strict))
"""


class ForkServer:
    """The server of a test run; imports nothing before it is first asked for a process.

    Attributes:
        python: a program that runs `-c CODE` or `-m MODULE …` in a copy of the server, for execnet and torchrun.
    """

    def __init__(self, preloaded: Sequence[str] = PRELOADED) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="cw-fork-")
        # A short path: a socket's has at most 104 characters.
        address = os.environ[ADDRESS_ENV] = f"{self._directory.name}/socket"
        root = Path(__file__).resolve().parent.parent
        self.python = Path(self._directory.name) / "python"
        self.python.write_text(_PYTHON.format(python=sys.executable, root=str(root)), encoding="utf-8")
        self.python.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(64)  # from here on requests wait, however long the server takes to start
        if not os.access(Path.home(), os.W_OK):
            # Else matplotlib makes a directory at import, which every copy would remove at its end.
            os.environ.setdefault("MPLCONFIGDIR", self._directory.name)
        with listener:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(listener.fileno()), *preloaded],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                cwd=root,
            )

    def close(self) -> None:
        """Ends the server; what it started goes on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._directory.cleanup()


class ForkedProcess:
    """What `subprocess.Popen([sys.executable, "-m", module, …])` would be, as far as tests use it.

    With `bound` it is killed when this process ends, with `strict` its warnings are errors.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        streams: tuple[int, int, int],
        code: str = "",
        bound: bool = False,
        strict: bool = False,
    ) -> None:
        self.args = [sys.executable, "-m", module, *arguments]
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(os.environ[ADDRESS_ENV])
        wanted = {
            "module": module,
            "code": code,
            "arguments": list(arguments),
            "env": dict(env),
            "directory": str(Path.cwd()),
            "bound": bound,
            "strict": strict,
        }
        message = json.dumps(wanted).encode()
        socket.send_fds(self._server, [len(message).to_bytes(4, "big")], streams)
        self._server.sendall(message)
        self.pid = int.from_bytes(_exactly(self._server, 4), "big")

    def poll(self) -> int | None:
        """The exit status once it has ended; a signal's number is negative."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._server, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int.from_bytes(_exactly(self._server, 4), "big", signed=True)
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends the signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


def forking_python() -> str:
    """A program that runs `-m MODULE …` as Python does: in a copy of the server if there is one."""
    address = os.environ.get(ADDRESS_ENV)
    return str(Path(address).with_name("python")) if address else sys.executable


def run_as(module: str, code: str = "", *, strict: bool = False) -> int:
    """Runs the module, or the code, on this process's arguments, streams and environment; returns its exit status.

    For scripts that stand in for a program: signals go on to the copy of the server that does the work, and neither
    outlives its supervisor.
    """
    die_with_parent()
    passed_on = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until there is a process to pass them on to
    program = ForkedProcess(
        module, sys.argv[1:], env=os.environ, streams=(0, 1, 2), code=code, bound=True, strict=strict
    )

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program.pid, number)

    for number in passed_on:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    status = program.wait()
    return status if status >= 0 else 128 - status


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        if not (more := connection.recv(count - len(received))):
            raise ConnectionError("the fork server has ended")
        received += more
    return received


class _Server:
    """Accepts requests, forks, and tells each client how its process ended."""

    def __init__(self, listener: int) -> None:
        self.listener = socket.socket(fileno=listener)
        self.preloaded = sys.argv[2:]
        self.clients: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        self.woken, wake = socket.socketpair()
        wake.setblocking(False)
        self.woken.setblocking(False)
        self.wake = wake

    def serve(self) -> dict[str, object] | None:
        """Returns None when standard input was closed, and in each forked child what it is to run."""
        # Of libraries that were imported: an allocator's, and a pool that waits; both are told of forks.
        warnings.filterwarnings("ignore", ".* is multi-threaded, use of fork", DeprecationWarning)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        with self.selector as selector:
            for source in (self.listener, self.woken, sys.stdin.buffer):
                selector.register(source, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is sys.stdin.buffer:
                        return None
                    if key.fileobj is self.woken:
                        self.reap()
                    elif key.data is not None:
                        self.end_bound(key.data)
                    elif (wanted := self.fork()) is not None:
                        return wanted

    def end_bound(self, pid: int) -> None:
        """Kills a process whose client has ended, which is all that it could have to say."""
        # Both may have ended since the last look: then it is reaped, and the number may be another's.
        if (client := self.clients.get(pid)) is not None and client in self.selector.get_map():
            self.selector.unregister(client)
            os.kill(pid, signal.SIGKILL)

    def fork(self) -> dict[str, object] | None:
        """Takes one request; returns it in the child. A client may be killed at any moment."""
        client, _ = self.listener.accept()
        streams: list[int] = []
        try:
            length, streams, _, _ = socket.recv_fds(client, 4, 3)
            wanted: dict[str, object] = json.loads(_exactly(client, int.from_bytes(length, "big")))
        except (OSError, ValueError):
            for stream in streams:
                os.close(stream)
            client.close()
            return None
        if self.preloaded:
            for name in self.preloaded:
                importlib.import_module(name)
            self.preloaded = []
            # Copies share what was imported for as long as nobody, a collector least of all, touches it.
            gc.collect()
            gc.freeze()
        if pid := os.fork():
            for stream in streams:
                os.close(stream)
            self.clients[pid] = client
            if wanted["bound"]:
                self.selector.register(client, selectors.EVENT_READ, pid)
            with contextlib.suppress(OSError):
                client.sendall(pid.to_bytes(4, "big"))
            return None
        client.close()
        self.become(streams)
        return wanted

    def become(self, streams: Sequence[int]) -> None:
        """In the child: nothing of the server's is left, and the standard streams are those of the request."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for connection in (self.listener, self.woken, self.wake, *self.clients.values()):
            connection.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)

    def reap(self) -> None:
        """Tells the clients of ended processes."""
        while True:
            try:
                if not self.woken.recv(4096):
                    break
            except BlockingIOError:
                break
        while self.clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self.clients.pop(pid) as client:
                if client in self.selector.get_map():
                    self.selector.unregister(client)
                try:
                    client.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
                except OSError:
                    continue  # nobody waits for it any more


def main() -> None:
    """Serves; in a child, goes on as the module that was asked for."""
    wanted = _Server(int(sys.argv[1])).serve()
    if wanted is None:
        os._exit(0)
    os.environ.clear()
    os.environ.update(wanted["env"])  # type: ignore[call-overload]  # names and values, as the client wrote them
    os.chdir(str(wanted["directory"]))
    # As a new interpreter would have it.
    sys.path[:0] = [str(wanted["directory"]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if wanted["strict"]:
        warnings.simplefilter("error")
    if CHILDREN_ENV in os.environ:
        sys.executable = forking_python()
    sys.argv = [str(wanted["module"] or "-c"), *wanted["arguments"]]  # type: ignore[misc]  # as above
    status = _status_of(str(wanted["module"]), str(wanted["code"]))
    # As an interpreter ends, but for taking apart all that was imported, which takes four seconds.
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads; there is no other name for it
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _status_of(module: str, code: str) -> int:
    """Runs it; what is uncaught is printed. Returns an interpreter's status, a signal's number as negative."""
    try:
        if code:
            exec(code, {"__name__": "__main__"})
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return int(end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - uncaught, it ends the program
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    main()
