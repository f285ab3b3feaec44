"""`code-worker doctor`: what works, what does not, and what to do about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from code_worker.cli.output import console, print_json_lines
from code_worker.logs import configure_logging
from code_worker.terminal import printable
from code_worker.worker.doctor import PARTS, Check, Status, examine, hung

__all__ = ["doctor"]

_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS), metavar="[PART]…")
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Instead of the one that the settings name."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per finding: name, status, message, hint.")
def doctor(parts: tuple[str, ...], data_dir: Path | None, as_json: bool) -> None:
    """Check each part of an installation, or those named, with a hint for each fault.

    Exit status: 0 all well, or warnings only; 1 something does not work.
    """
    configure_logging("error", "auto")
    overrides = {"data_dir": data_dir} if data_dir else {}
    if as_json:
        found = list(examine(parts or PARTS, **overrides))
        print_json_lines(asdict(check) for check in found)
    else:
        with console(stderr=True).status("looking"):
            found = list(examine(parts or PARTS, **overrides))
        _print(found)
    status = 1 if any(check.status is Status.FAIL for check in found) else 0
    if hung():
        # A thread that is stuck in a driver would make the interpreter abort while it shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _print(found: Sequence[Check]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        style = _STYLES[check.status]
        table.add_row(Text(check.status.value, style=style), Text(check.name), Text(printable(check.message)))
        if check.hint and check.status is not Status.OK:
            table.add_row("", "", Text(printable(f"→ {check.hint}"), style="dim"))
    console().print(table)
