"""Small real child programs, `code-worker up` as a process, and a bounded wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from code_worker.stack.supervisor import Child
from tests.fork_server import ADDRESS_ENV, CHILDREN_ENV, ForkedProcess
from tests.patience import LIMIT_S, polls

CLI = (sys.executable, "-m", "code_worker")
_PRELUDE = """
import os, signal, sys, time
from code_worker.system.processes import die_with_parent
die_with_parent()
def note(path, text):
    with open(path, "a") as stream:
        stream.write(text + "\\n")
"""


def child(name: str, body: str, **options: object) -> Child:
    """A Python child with `note(path, text)` at hand."""
    return Child(name, (sys.executable, "-c", _PRELUDE + body), **options)  # type: ignore[arg-type]


def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Returns once the condition holds; fails when it never does."""
    for _ in polls(limit_s, 0.02):
        if condition():
            return
    raise AssertionError(f"still not so after {limit_s} s")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def is_gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped by whoever adopted it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Up:
    """`code-worker up` as a process of its own, its output in a file.

    With `forked` it and what it starts are forked off what has imported everything; then it has no process group of
    its own.
    """

    def __init__(self, data_dir: Path, output: Path, *, forked: bool = False, **env: str) -> None:
        self.data_dir = data_dir
        self.output = output
        self.process: subprocess.Popen[bytes] | ForkedProcess
        with output.open("wb") as stream, Path(os.devnull).open("rb") as nothing:
            if forked and ADDRESS_ENV in os.environ:
                arguments = ("up", "--data-dir", str(data_dir))
                streams = (nothing.fileno(), stream.fileno(), stream.fileno())
                self.process = ForkedProcess(
                    "code_worker", arguments, env={**os.environ, **env, CHILDREN_ENV: "1"}, streams=streams
                )
                return
            self.process = subprocess.Popen(
                [*CLI, "up", "--data-dir", str(data_dir)],
                env={**os.environ, **env},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        until(lambda: "Ctrl-C" in self.text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        return self.output.read_text()

    def children(self) -> list[int]:
        return [each.pid for each in psutil.Process(self.process.pid).children(recursive=True)]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_S)
