"""`code-worker doctor`: what works, what does not, and what to do about it."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import click
from rich.status import Status as RichStatus
from rich.table import Table
from rich.text import Text

from code_worker.cli.common.output import console, print_json_lines
from code_worker.doctor import PARTS, examine
from code_worker.doctor.check import Check, Status, hung
from code_worker.logs import configure_logging
from code_worker.system.terminal import printable

_STATUS_WIDTH = max(map(len, Status))
_NAME_WIDTH = max(map(len, PARTS))
_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS), metavar="[PART]…")
@click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Instead of the one that the settings name."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per finding: name, status, message, hint.")
def doctor(parts: tuple[str, ...], data_dir: Path | None, as_json: bool) -> None:
    """Check each part of an installation, or those named, with a hint for each fault, printed as each part ends.

    Exit status: 0 all well, or warnings only; 1 something does not work.
    """
    configure_logging("error", "auto")
    overrides = {"data_dir": data_dir} if data_dir else {}
    failed = False
    with closing(_Spinner()) as spinner:
        for check in examine(parts or PARTS, on_part=spinner.begin, **overrides):
            spinner.close()
            if as_json:
                print_json_lines([asdict(check)])
            else:
                _print(check)
            failed |= check.status is Status.FAIL
    if hung():
        # A thread that is stuck in a driver would make the interpreter abort while it shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed)
    sys.exit(failed)


class _Spinner:
    """Says on a terminal which part is looked at; it ends before a line is printed, which it would tear."""

    def __init__(self) -> None:
        self._status: RichStatus | None = None

    def begin(self, part: str) -> None:
        self.close()
        if (errors := console(stderr=True)).is_terminal:
            self._status = errors.status(f"looking at {part}")
            self._status.start()

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _print(check: Check) -> None:
    """One finding, in columns that fit every part: none waits for the others."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, min_width=_STATUS_WIDTH)
    table.add_column(no_wrap=True, min_width=_NAME_WIDTH)
    table.add_column(overflow="fold")
    style = _STYLES[check.status]
    table.add_row(Text(check.status.value, style=style), Text(check.name), Text(printable(check.message)))
    if check.hint and check.status is not Status.OK:
        table.add_row("", "", Text(printable(f"→ {check.hint}"), style="dim"))
    console().print(table)
