"""A standard output that is full or was closed ends every command with status 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from code_worker.store import jobs
from code_worker.store.engine import Store
from tests.cli.ledger_rows import judged
from tests.fork_server import forking_python

COMMANDS = [
    *("heads list", "heads list --json", "verdicts export --jsonl", "verdicts export --csv", "verdicts list"),
    *("jobs list", "jobs list --json", "jobs counts", "db current", "db upgrade --sql", "--help", "--version"),
    "schedule list",
]
FULL = "code-worker: cannot write the output: No space left on device\n"


def ran(store: Store, tmp_path: Path, words: str, *, full: bool) -> tuple[int, str]:
    """Status and stderr of a command whose stdout is full, or closed at its other end."""
    if full:
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reads, out = os.pipe()
        os.close(reads)
    env = {**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_DATABASE_URL": store.url}
    program = [forking_python(), "-c", "from code_worker.cli.main import main; main()", *words.split()]
    try:
        done = subprocess.run(program, env=env, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(out)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_ends_alike(sqlite_store: Store, tmp_path: Path, words: str) -> None:
    judged(sqlite_store, "s3://b/a.jpg", 0.9)
    status, said = ran(sqlite_store, tmp_path, words, full=True)
    assert (status, said[-len(FULL) :], "Traceback" in said) == (1, FULL, False)
    status, said = ran(sqlite_store, tmp_path, words, full=False)
    assert (status, "cannot write" in said, "Traceback" in said, "ignored" in said) == (1, False, False, False)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    "words", ["enqueue s3://b/a.jpg", "enqueue --json s3://b/a.jpg", "enqueue --json --from {list}"]
)
def test_who_enqueues_hears_on_stderr_what_was_accepted(
    sqlite_store: Store, tmp_path: Path, words: str, full: bool
) -> None:
    (tmp_path / "list").write_text("".join(f"s3://b/{number}.jpg\n" for number in range(30)))
    status, said = ran(sqlite_store, tmp_path, words.format(list=tmp_path / "list"), full=full)
    assert status == 1
    found = sqlite_store.run(lambda session: jobs.list_jobs(session, limit=100), write=False)
    told = {tuple(line.split()[-2:]) for line in said.splitlines() if "accepted all the same: " in line}
    assert told <= {(job.id, job.uri) for job in found}
    assert len(told) == min(len(found), 20)
    assert (f"and {len(found) - 20} more: code-worker jobs list" in said) is (len(found) > 20)


def test_of_many_jobs_those_are_told_that_nobody_read(sqlite_store: Store, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("".join(f"s3://b/{number}.jpg\n" for number in range(3000)))
    env = {**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_DATABASE_URL": sqlite_store.url}
    words = ["enqueue", "--json", "--from", str(tmp_path / "list")]
    program = [forking_python(), "-c", "from code_worker.cli.main import main; main()", *words]
    with subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # One transaction of them; the next is more than a pipe holds.
        read = {json.loads(process.stdout.readline())["job"] for _ in range(1024)}
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 1
    told = {line.split()[-2] for line in said.splitlines() if "accepted all the same: " in line}
    assert len(told) == 20
    assert told.isdisjoint(read)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--version", 0),
        ("jobs counts", 0),
        ("jobs counts --json", 0),
        ("verdicts export --csv", 0),
        ("schedule lisst", 2),
    ],
)
def test_a_standard_output_that_was_closed_from_the_start_fails_nothing(
    sqlite_store: Store, tmp_path: Path, words: str, status: int
) -> None:
    env = {**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_DATABASE_URL": sqlite_store.url}
    program = [sys.executable, "-c", "from code_worker.cli.main import main; main()", *words.split()]
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *program]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False)
