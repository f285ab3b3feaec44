"""The command line as a user runs it, in this process, over a real database."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from code_worker.cli.main import main
from code_worker.store.engine import Store


@dataclass
class Ran:
    status: int
    stdout: str
    stderr: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]


@dataclass
class Cli:
    """Calls `main()` with these arguments and settings; what it prints is kept, nothing is caught but its exit."""

    env: dict[str, str] = field(default_factory=dict)

    def __call__(self, *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None) -> Ran:
        runner = CliRunner(env={**self.env, **(env or {})})
        argv, status = sys.argv, 0
        with runner.isolation(stdin) as (out, err, _):
            sys.argv = ["code-worker", *arguments]
            try:
                main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            finally:
                sys.argv = argv
            sys.stdout.flush()
            return Ran(status, out.getvalue().decode(), err.getvalue().decode())


@pytest.fixture
def bare_cli(tmp_path: Path) -> Iterator[Cli]:
    """With an empty data directory, and nothing configured."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield Cli({"CODE_WORKER_DATA_DIR": str(tmp_path / "data"), "CODE_WORKER_LOG_FORMAT": "json"})
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def cli(bare_cli: Cli, store: Store) -> Cli:
    """With a migrated database; every test that asks for it runs on SQLite and on PostgreSQL."""
    bare_cli.env["CODE_WORKER_DATABASE_URL"] = store.url
    return bare_cli


@pytest.fixture
def sqlite_cli(bare_cli: Cli, sqlite_store: Store) -> Cli:
    bare_cli.env["CODE_WORKER_DATABASE_URL"] = sqlite_store.url
    return bare_cli
