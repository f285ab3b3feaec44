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

from code_worker.cli.demo_report import print_report, print_title
from code_worker.cli.output import console
from code_worker.cli.progress import progress
from code_worker.logs import configure_logging

if TYPE_CHECKING:
    from code_worker.demo.place import Place
    from code_worker.demo.run import Result

__all__ = ["demo"]

_WARNING = (
    'A toy. Its "generated" images are photographs that toy generators changed, and its encoder is a miniature that '
    "learned from nothing else: these verdicts mean nothing about images that a real generator made. What is real is "
    "everything else: S3 protocol, broker, worker, trainer, database, the rejections, the retrain and the gate."
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
@click.option(
    "--learning/--no-learning",
    default=True,
    show_default=True,
    help="Go on: a new toy generator appears, some of its images are labelled, and a retrain learns it.",
)
def demo(*, images: int, directory: Path, learning: bool) -> None:
    """Run the whole main job on a toy set, let it learn a new toy generator, and print what happened.

    Needs no network, no weights and no server; takes some minutes, most of them for the retrain.

    Exit status: 0 all went as it must; 1 it did not, or the gate rejected what was learned; 2 it cannot run here.
    """
    configure_logging("warning")
    signal.signal(signal.SIGTERM, _stop)
    from code_worker.demo.place import own_place  # what follows imports torch
    from code_worker.demo.run import run_demo

    console().print(Panel(_WARNING, title="code-worker demo", width=min(100, console().width)))
    began = time.perf_counter()
    with own_place(directory) as place:
        result = run_demo(place, images, _step, progress, learning=learning)
    console().print(Text(f"{time.perf_counter() - began:7.1f} s  in all", style="bold"))
    passed = print_report(result)
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


def _say_next(place: Place, result: Result) -> None:
    program = Path(sys.argv[0])
    command = _shown(program) if program.name == "code-worker" else "code-worker"
    ours = f"CODE_WORKER_DATA_DIR={_shown(place.data)} {command}"
    job = next((verdict.job_id for verdict in result.verdicts if verdict.label == "fake"), result.jobs[0].id)
    print_title("The database", _shown(place.data / "code_worker.db"))
    print_title("Try next", "")
    commands = [
        "verdicts list --limit 5",
        f"verdicts show {job}",
        "verdicts list --outcome rejected",
        "jobs counts",
        f"scan {_shown(place.images)}",
    ]
    if result.lesson is not None:
        commands += [f"runs show {result.lesson.run.id}", "labels list --limit 5", "releases list"]
    for line in commands:
        click.echo(f"  {ours} {line}")
    click.echo(f"\nWith the published weights: {command} releases import hf:aimagelab/CoDE --promote")


def _shown(path: Path) -> str:
    """A path for a shell, as short as it may be."""
    absolute = path.absolute()
    return shlex.quote(str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute))
