"""Exports and JSON to a terminal hold nothing that it would act on; files and pipes get every byte."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from code_worker.store.engine import Store
from code_worker.store.learning import labels
from code_worker.store.learning.labels import NewLabel
from tests.cli.ledger_rows import judged
from tests.fork_server import forking_python

EVIL = "\x1b[2J\x9b31m\u202e\nall: erased"
URI = f"s3://b/{EVIL}.jpg"
_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COMMANDS = [
    *("verdicts export --csv", "verdicts export --jsonl", "verdicts list --json"),
    *("labels export --csv", "labels export --csv --statements --raw", "labels export --jsonl", "jobs list --json"),
]


@pytest.fixture
def environment(sqlite_store: Store, tmp_path: Path) -> dict[str, str]:
    """Of a ledger with a verdict and a label whose names are a stranger's."""
    judged(sqlite_store, URI, 0.9)
    said = NewLabel("ab" * 32, "fake", f"eve{EVIL}", "api", generator=f"g{EVIL}", uri=URI, note=EVIL)
    sqlite_store.run(lambda session: labels.add(session, [said]))
    return {**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_DATABASE_URL": sqlite_store.url}


def program(words: str) -> list[str]:
    return [forking_python(), "-c", "from code_worker.cli.main import main; main()", *words.split()]


def shown(words: str, environment: dict[str, str]) -> str:
    """What the command writes to a terminal."""
    ours, theirs = pty.openpty()
    null = subprocess.DEVNULL
    with subprocess.Popen(program(words), env=environment, stdout=theirs, stderr=null, stdin=null) as process:
        os.close(theirs)
        found = b""
        while True:
            try:
                some = os.read(ours, 1 << 16)
            except OSError:  # Linux says the end of a terminal so
                break
            if not some:
                break
            found += some
    os.close(ours)
    assert process.returncode == 0
    return found.decode().replace("\r\n", "\n")


def piped(words: str, environment: dict[str, str]) -> str:
    done = subprocess.run(program(words), env=environment, capture_output=True, check=True)
    return done.stdout.decode()


@pytest.mark.parametrize("words", COMMANDS)
def test_a_terminal_gets_escapes(environment: dict[str, str], words: str) -> None:
    said = shown(words, environment)
    assert not _UNSAFE.findall(said)
    assert not [line for line in said.splitlines() if line.startswith("all: erased")]
    assert "all: erased" in said
    if "csv" not in words:
        # The same JSON: what is copied from the terminal means what the pipe says.
        assert [json.loads(line) for line in said.splitlines()] == [
            json.loads(line) for line in piped(words, environment).split("\n") if line
        ]


@pytest.mark.parametrize(
    ("words", "column", "value"),
    [("verdicts export --csv", "uri", URI), ("labels export --csv", "generator", f"g{EVIL}")],
)
def test_a_pipe_and_a_file_get_every_byte(
    environment: dict[str, str], words: str, column: str, value: str, tmp_path: Path
) -> None:
    text = piped(words, environment)
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row[column] == value
    piped(f"{words} --output {tmp_path / 'out.csv'}", environment)
    assert (tmp_path / "out.csv").read_bytes().decode() == text
