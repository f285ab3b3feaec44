"""Runs the code blocks of a page, in order, as a reader would who types them one after the other.

`sh` and `python` blocks are run; `toml` blocks must be settings that are accepted; `text` blocks are for reading
only; any other language is an error. A `python` or `toml` block whose first line is `# file: NAME` is written to NAME
instead. A `sh background` block is left running until the end of the page, where Ctrl-C must end it with status 0.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fork_server import ADDRESS_ENV, CHILDREN_ENV, forking_python

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {"sh", "sh background", "python", "toml", "text"}
RUN_LIMIT_S = 600
START_LIMIT_S = 240
_FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"\A# file: (?P<name>\S+)\n")
# As tests/fork_server.py has it.
_PROGRAM = """#!/bin/sh
'''exec' "{python}" -IS "$0" "$@"
' '''
import sys
sys.path.insert(0, {root!r})
from tests.fork_server import run_as
sys.exit(run_as("{module}"))
"""
_MAKE = """#!/bin/sh
# Says whether the target exists; making it here would run the tests in the tests.
exec "{make}" --dry-run --directory "{root}" "$@"
"""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    info: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Fenced blocks of a Markdown page.

    Raises:
        ValueError: a block in a language that the runner does not know, or a fence that is never closed.
    """
    text = path.read_text(encoding="utf-8")
    found = [
        Block(path.name, text.count("\n", 0, match.start()) + 1, match["info"].strip(), match["code"])
        for match in _FENCE.finditer(text)
    ]
    if len(re.findall(r"^```", text, re.MULTILINE)) != 2 * len(found):
        raise ValueError(f"{path.name}: a fence that is never closed")
    if unknown := [block for block in found if block.info not in LANGUAGES]:
        raise ValueError(f"{unknown[0].place}: cannot run {unknown[0].info!r}; one of {sorted(LANGUAGES)}")
    return found


def _exec_last(code: str) -> str:
    """The script with its last command in the shell's place, so that Ctrl-C reaches it."""
    *before, last = code.strip().splitlines()
    return "\n".join([*before, f"exec {last}"])


class Reader:
    """Somebody with a terminal in an empty directory; `ready` is what a background program prints once it serves."""

    def __init__(self, directory: Path, environment: Mapping[str, str], *, ready: str = "Ctrl-C") -> None:
        self.directory = directory
        self._ready = ready
        self._background: list[subprocess.Popen[bytes]] = []
        programs = directory.parent / f"{directory.name}-bin"
        programs.mkdir()
        scripts = {"make": _MAKE.format(make=shutil.which("make"), root=ROOT)}
        if ADDRESS_ENV in os.environ:
            for name, module in (("code-worker", "code_worker"), ("pytest", "pytest")):
                scripts[name] = _PROGRAM.format(python=sys.executable, root=str(ROOT), module=module)
        for name, text in scripts.items():
            (programs / name).write_text(text, encoding="utf-8")
            (programs / name).chmod(0o755)
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = {**os.environ, **environment, "PATH": path, "PYTHONUNBUFFERED": "1", CHILDREN_ENV: "1"}

    def run(self, block: Block) -> str:
        """Runs one block and returns what it printed.

        Raises:
            AssertionError: it failed; the text is what it printed.
        """
        if block.info == "text":
            return ""
        if match := _FILE.match(block.code):
            target = self.directory / match["name"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.code, encoding="utf-8")
            return self._settings(block) if block.info == "toml" else ""
        if block.info == "sh background":
            return self._start(block)
        if block.info == "toml":
            return self._settings(block)
        program = (
            ["bash", "-euo", "pipefail", "-c"] if block.info == "sh" else [forking_python(), "-W", "error", "-c"]
        )
        return self._finish(block, [*program, block.code])

    def _settings(self, block: Block) -> str:
        path = self.directory / f"settings-{block.line}.toml"
        path.write_text(block.code, encoding="utf-8")
        check = "from code_worker.settings import load_settings; load_settings()"
        return self._finish(block, [forking_python(), "-c", check], {"CODE_WORKER_CONFIG": str(path)})

    def _finish(self, block: Block, command: list[str], more: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=self.directory,
            env={**self._environment, **(more or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_LIMIT_S,
        )
        assert done.returncode == 0, f"{block.place} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _start(self, block: Block) -> str:
        log = self.directory.parent / f"{self.directory.name}-{block.line}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", _exec_last(block.code)],
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._background.append(process)
        deadline = time.monotonic() + START_LIMIT_S
        while self._ready not in (said := log.read_text(encoding="utf-8")):
            assert process.poll() is None, f"{block.place} ended with {process.returncode}\n{said}"
            assert time.monotonic() < deadline, f"{block.place} did not start in {START_LIMIT_S} s\n{said}"
            time.sleep(0.1)
        return said

    def close(self) -> list[int]:
        """Ctrl-C to what still runs in the background; the exit statuses."""
        for process in self._background:
            process.send_signal(signal.SIGINT)
        return [self._ended(process) for process in self._background]

    @staticmethod
    def _ended(process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        statuses = self.close()
        if error is None:
            assert statuses == [0] * len(statuses)
