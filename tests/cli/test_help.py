"""Asking for help costs nothing: no model code, no broker client, no database layer is imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from code_worker.cli.main import cli
from code_worker.data.label_files.label_import import FORMS
from code_worker.encoder.engines import ENGINES
from tests.cli.conftest import Cli

HEAVY = {"boto3", "celery", "numpy", "PIL", "sklearn", "sqlalchemy", "torch"}
COMMANDS = [
    "",
    "refit",
    "retrain",
    "runs list",
    "runs show",
    "schedule list",
    "data",
    "data pack",
    "data show",
    "demo",
    "enqueue",
    "jobs",
    "jobs retry",
    "label",
    "labels import",
    "scan",
    "verdicts",
    "verdicts list",
    "verdicts export",
]
PROGRAM = """
import contextlib, io, json, os, sys
from code_worker.cli.main import main

def helped(arguments):
    sys.argv = ["code-worker", *arguments.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            main()
        except SystemExit as end:
            assert not end.code
    return [arguments, printed.getvalue(), sorted({name.partition(".")[0] for name in sys.modules})]

for arguments in sys.argv[1:]:
    if (child := os.fork()) == 0:
        print(json.dumps(helped(arguments)), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, arguments
"""


@pytest.fixture(scope="module")
def helped() -> dict[str, tuple[str, set[str]]]:
    """What each command's help printed and what was imported for it: in a copy, made before, of one process."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *COMMANDS],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = map(json.loads, done.stdout.splitlines())
    return {arguments: (printed, set(modules)) for arguments, printed, modules in told}


@pytest.mark.parametrize("arguments", COMMANDS)
def test_help_imports_nothing_heavy(arguments: str, helped: dict[str, tuple[str, set[str]]]) -> None:
    printed, modules = helped[arguments]
    assert printed.startswith(f"Usage: code-worker {arguments}".rstrip())
    assert HEAVY.isdisjoint(modules)
    assert "click" in modules


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("scna x", "No such command 'scna'. Did you mean 'scan'?"),
        ("wroker", "No such command 'wroker'. Did you mean 'worker'?"),
        ("labl", "Did you mean 'label' or 'labels'?"),
        ("xyzzy", "No such command 'xyzzy'."),
        ("jobs lst", "'lst'. Did you mean 'list'?"),
        ("scan --jsno", "'--jsno'. Did you mean '--json'?"),
    ],
)
def test_a_misspelt_command_or_option_is_answered_with_what_was_meant(words: str, said: str) -> None:
    ended = CliRunner().invoke(cli, words.split())
    assert ended.exit_code == 2
    assert said in ended.output


@pytest.mark.parametrize("words", [["heads", "list"], ["heads", "list", "--json"], ["--help"]])
def test_output_that_cannot_be_written_is_one_line(words: list[str]) -> None:
    program = [sys.executable, "-c", "from code_worker.cli.main import main; main()", *words]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        ran = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "code-worker: cannot write the output: No space left on device\n")


def test_a_file_that_this_user_may_not_use_is_one_line() -> None:
    """As root all may be used, so that the refusal is raised here."""
    program = """
import code_worker.cli.main as program

def refused(**_):
    raise PermissionError(13, "Permission denied", "/closed/file")

program.cli = refused
program.main()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (
        2,
        "code-worker: this user may not use /closed/file: Permission denied\n",
    )


def test_a_workers_name_that_would_mean_something_to_celery_is_refused(bare_cli: Cli) -> None:
    for name in ("worker@here", "worker-%i", ""):
        said = bare_cli("worker", "--name", name)
        assert (said.status, "letters, digits" in said.stderr) == (2, True)


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        (("labels", "import"), "form", tuple(FORMS)),
        (("releases", "verify"), "engine", ENGINES),
    ],
)
def test_an_option_offers_all_that_the_code_can_do(
    command: tuple[str, ...], option: str, names: tuple[str, ...]
) -> None:
    """The names are written twice: a command line that answers at once imports neither readers nor engines."""
    found: click.Command = cli
    for name in command:
        assert isinstance(found, click.Group)
        known = found.get_command(click.Context(found), name)
        assert known is not None
        found = known
    (choice,) = (each.type for each in found.params if each.name == option)
    assert isinstance(choice, click.Choice)
    assert tuple(choice.choices) == names
