"""At a place without a database a command says so and makes nothing there, unless it is there to make one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from code_worker.cli.main import cli as program
from tests.cli.conftest import Cli

ID = "0198c5a2-7f31-7abc-9def-0123456789ab"
NEED_IT = [
    *("audit list", "audit verify", "db backup {tmp}/copy.db", "enqueue s3://b/a.jpg", "erase --tenant a --yes"),
    *("erase --resume", "erasures check --tenant a", "erasures list", f"erasures show {ID}", "jobs counts"),
    *(
        "jobs dead-letters",
        "jobs list",
        f"jobs retry {ID}",
        f"jobs show {ID}",
        f"label {ID} fake",
        "labels conflicts",
    ),
    *("labels export", "labels import {tmp}/labels.csv", "labels list", f"labels settle {ID} fake", "plugins seen"),
    *("plugins select-head", "policies list", "policies set --low 0.4 --high 0.6", "refit", "releases challenge r-1"),
    *(
        "releases drop-head r-1 knn",
        "releases list",
        "releases promote r-1",
        "releases rollback",
        "releases show r-1",
    ),
    *(
        "releases verify",
        "rescore --since 1d",
        "retrain",
        "runs list",
        f"runs show {ID}",
        "schedule list",
        "shadow report",
    ),
    *("verdicts export", "verdicts list", f"verdicts show {ID}", "verdicts timings", "data show labels:"),
    *(
        "calibrate {tmp}/images --max-fpr 0.01",
        "db current",
        "releases sign r-1",
        "data pack labels: --out {tmp}/out",
    ),
    *("data pin labels:", "validate labels:", "doctor database", "scan {tmp}/images"),
]
NEED_NONE = [
    "validate {tmp}/images",
    "heads list",
    "plugins list",
    "plugins check linear",
    "doctor settings",
    "bench {tmp}/images",
    "erase",
]
"""They say nothing of a database, and make none either."""
MAKES = {"beat", "db restore", "db upgrade", "demo", "plugins new", "releases import", "trainer", "up", "worker"}
"""What is there to make something, or to run."""
STATUS_0 = {"schedule list"}
"""Shows what the settings say, and that nothing is known beside."""
STATUS_1 = {"db current", "db backup", "doctor database", "data show", "data pack", "data pin", "validate"}


def every(command: click.Command, words: tuple[str, ...], context: click.Context) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from every(below, (*words, name), context)
    else:
        yield " ".join(words)


def test_each_command_is_looked_at_here() -> None:
    names = set(every(program, (), click.Context(program)))
    tried = {name for name in names for line in (*NEED_IT, *NEED_NONE) if f"{line} ".startswith(f"{name} ")}
    assert tried | MAKES == names


@pytest.fixture
def run(bare_cli: Cli, tmp_path: Path) -> Cli:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels.csv").write_text("uri,label\ns3://b/a.jpg,fake\n")
    bare_cli.env["CODE_WORKER_DEVICE"] = "cpu"
    return bare_cli


@pytest.mark.parametrize("by", ["data_dir", "url"])
@pytest.mark.parametrize("line", NEED_IT)
def test_what_needs_a_database_says_that_there_is_none_and_makes_none(
    run: Cli, tmp_path: Path, line: str, by: str
) -> None:
    if by == "url":
        run.env["CODE_WORKER_DATABASE_URL"] = f"sqlite:///{tmp_path / 'typo' / 'code_worker.db'}"
    before = sorted(tmp_path.rglob("*"))
    ran = run(*line.format(tmp=tmp_path).split())
    name = next((one for one in STATUS_0 | STATUS_1 if line.startswith(one)), "")
    assert ran.status == (0 if name in STATUS_0 else 1 if name in STATUS_1 else 2), ran
    assert sorted(tmp_path.rglob("*")) == before, ran
    assert "database" in ran.stdout + ran.stderr, ran
    assert str(tmp_path / ("typo" if by == "url" else "data")) in (ran.stdout + ran.stderr).replace("\n", ""), ran


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:////tmp/a.db?mode=ro"])
def test_a_url_that_names_no_plain_file_is_refused_as_such(run: Cli, url: str) -> None:
    ran = run("jobs", "list", env={"CODE_WORKER_DATABASE_URL": url})
    assert (ran.status, "SQLite must be a plain file" in ran.stderr) == (2, True)


@pytest.mark.parametrize("line", NEED_NONE)
def test_what_needs_no_database_makes_none(run: Cli, tmp_path: Path, line: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    run(*line.format(tmp=tmp_path).split())
    assert sorted(tmp_path.rglob("*")) == before
