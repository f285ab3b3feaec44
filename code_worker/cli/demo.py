"""`code-worker demo`: the whole main job on a toy set, with nothing but this machine."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
from rich.panel import Panel
from rich.text import Text

from code_worker.cli.output import console, print_table
from code_worker.cli.progress import progress
from code_worker.logs import configure_logging

if TYPE_CHECKING:
    from code_worker.demo.place import Place
    from code_worker.demo.run import Result

__all__ = ["demo"]

_WARNING = (
    'A toy. Its "generated" images are photographs shrunk and enlarged again, and its encoder was never trained: '
    "these verdicts mean nothing about images that a real generator made. What is real is everything else: "
    "S3 protocol, broker, worker process, database, and the rejections."
)


@click.command()
@click.option("--images", type=click.IntRange(8, 100_000), default=300, show_default=True, help="Images to judge.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where everything is put; an earlier demo there is replaced.",
)
def demo(images: int, directory: Path) -> None:
    """Run the whole main job on a toy set and print what happened.

    Needs no network, no weights and no server.

    Exit status: 0 all went as it must; 1 it did not; 2 it cannot run here.
    """
    configure_logging("warning")
    signal.signal(signal.SIGTERM, _stop)
    from code_worker.demo.place import own_place  # noqa: PLC0415 - what follows imports torch
    from code_worker.demo.run import run_demo  # noqa: PLC0415 - as above

    console().print(Panel(_WARNING, title="code-worker demo", width=min(100, console().width)))
    began = time.perf_counter()
    with own_place(directory) as place:
        result = run_demo(place, images, _step, progress)
    passed = _report(result, time.perf_counter() - began)
    _say_next(place, result)
    sys.exit(0 if passed else 1)


def _stop(_number: int, _frame: FrameType | None) -> None:
    """As Ctrl-C does: every `with` on the way stops what it started."""
    raise KeyboardInterrupt


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Says what is being done, and how long it took."""
    out, began = console(), time.perf_counter()
    yield
    out.print(Text(f"{time.perf_counter() - began:7.1f} s  ", style="dim").append(what, style="not dim"))


def _report(result: Result, seconds: float) -> bool:
    from code_worker.demo.findings import by_reason, by_source, checks, images_per_s  # noqa: PLC0415 - see above

    out = console()
    out.print(Text(f"{seconds:7.1f} s  in all", style="bold"))
    rows = [
        {
            "made by": row.source,
            "images": row.images,
            "judged real": row.real,
            "judged fake": row.fake,
            "right": f"{row.right:.1%}",
        }
        for row in by_source(result)
    ]
    _title("Verdicts by source", f"head linear, fitted on {result.trained_on} other cuts of the same two photographs")
    print_table(rows, ("made by", "images", "judged real", "judged fake", "right"), empty="nothing was judged")
    reasons = [
        {"reason": reason, "images": len(names), "such as": ", ".join(names)}
        for reason, names in by_reason(result).items()
    ]
    _title("Rejections by reason", "each on its own: no neighbour was touched")
    print_table(reasons, ("reason", "images", "such as"), empty="nothing was rejected")
    rate = images_per_s(result)
    _title("Throughput", "from the first claim to the last verdict, by the database's clock")
    click.echo("not measured" if rate is None else f"{rate:.1f} images/s through broker, worker and database")
    _title("Checks", "")
    return _print_checks(list(checks(result)))


def _title(title: str, note: str) -> None:
    console().print(Text(f"\n{title}", style="bold").append(f"  {note}" if note else "", style="not bold dim"))


def _print_checks(found: list[tuple[str, bool]]) -> bool:
    for statement, holds in found:
        mark = Text("ok   ", style="green") if holds else Text("FAIL ", style="bold red")
        console().print(mark.append(statement, style="default"))
    return all(holds for _, holds in found)


def _say_next(place: Place, result: Result) -> None:
    program = Path(sys.argv[0])
    command = _shown(program) if program.name == "code-worker" else "code-worker"
    ours = f"CODE_WORKER_DATA_DIR={_shown(place.data)} {command}"
    job = next((verdict.job_id for verdict in result.verdicts if verdict.label == "fake"), result.jobs[0].id)
    _title("The database", _shown(place.data / "code_worker.db"))
    _title("Try next", "")
    for line in (
        f"{ours} verdicts list --limit 5",
        f"{ours} verdicts show {job}",
        f"{ours} verdicts list --outcome rejected",
        f"{ours} jobs counts",
        f"{ours} scan {_shown(place.images)}",
    ):
        click.echo(f"  {line}")
    click.echo(f"\nWith weights that were trained: {command} releases import hf:aimagelab/CoDE --promote")


def _shown(path: Path) -> str:
    """A path for a shell, as short as it may be."""
    absolute = path.absolute()
    return shlex.quote(str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute))
