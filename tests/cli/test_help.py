"""Asking for help costs nothing: no model code, no broker client, no database layer is imported for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"boto3", "celery", "numpy", "PIL", "sklearn", "sqlalchemy", "torch"}
PROGRAM = """
import sys
from code_worker.cli.main import main
sys.argv = ["code-worker", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
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
    ],
)
def test_help_imports_nothing_heavy(arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments.split(), "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: code-worker {arguments}".rstrip())
    assert HEAVY.isdisjoint(done.stderr.split())
