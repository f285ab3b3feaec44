"""Progress of long work, on stderr; silent when that is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from code_worker.cli.common.interrupts import check_interrupt
from code_worker.cli.common.output import console
from code_worker.system.terminal import printable


@contextmanager
def progress(
    what: str, total: int | None = None, *, counted: bool = False, beside_rows: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar (a spinner while `total` is unknown) that goes when the work ends; yields what advances it.

    An interrupt that was lost ends the work at the next advance.

    `counted`: show the number reached although the total is unknown. `beside_rows`: the command prints rows
    meanwhile; where these go to the same terminal, they are progress enough.
    """
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *([] if total is None else [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]),
        *([TextColumn("{task.completed}")] if total is None and counted else []),
        console=console(stderr=True),
        transient=True,
        disable=not console(stderr=True).is_terminal or (beside_rows and sys.stdout.isatty()),
        # It would send to stderr what is printed on stdout.
        redirect_stdout=False,
    )
    with bar:
        task = bar.add_task(printable(what), total=total)

        def advance(done: int) -> None:
            check_interrupt()
            bar.advance(task, done)

        yield advance
