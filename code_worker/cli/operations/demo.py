"""`code-worker demo`: the whole main job on a toy set, and whether each check holds."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.panel import Panel
from rich.text import Text

from code_worker.cli.common.output import console, plural, print_table
from code_worker.cli.common.progress import progress
from code_worker.logs import configure_logging

if TYPE_CHECKING:
    from code_worker.demo.directory import Place
    from code_worker.demo.first_act import Result
    from code_worker.demo.second_act import Lesson

_SOURCES = ("made by", "images", "judged real", "judged fake", "right")
_CHANGES = ("made by", "images", "right before", "right after", "points")


def print_report(result: Result) -> bool:
    """Prints everything; whether every check holds."""
    from code_worker.demo.findings import checks, lesson_checks

    _print_verdicts(result)
    found = list(checks(result))
    if result.lesson is not None:
        _print_lesson(result.lesson)
        found += lesson_checks(result.lesson)
    print_title("Checks", "")
    return _print_checks(found)


def print_title(title: str, note: str) -> None:
    """A heading, and beside it what there is to know."""
    console().print(Text(f"\n{title}", style="bold").append(f"  {note}" if note else "", style="not bold dim"))


def _print_verdicts(result: Result) -> None:
    from code_worker.demo.findings import by_reason, by_source, images_per_s

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
    note = f"toy encoder, head linear, fitted on {result.trained_on} other cuts of the same two photographs"
    print_title("Verdicts by source", note)
    print_table(rows, _SOURCES, empty="nothing was judged")
    reasons = [
        {"reason": reason, "images": len(names), "such as": ", ".join(names)}
        for reason, names in by_reason(result).items()
    ]
    print_title("Rejections by reason", "each on its own: no neighbour was touched")
    print_table(reasons, ("reason", "images", "such as"), empty="nothing was rejected")
    rate = images_per_s(result)
    print_title("Throughput", "from the first claim to the last verdict, by the database's clock")
    click.echo("not measured" if rate is None else f"{rate:.1f} images/s through broker, worker and database")


def _print_lesson(lesson: Lesson) -> None:
    from code_worker.demo.findings import by_group

    run = lesson.run
    seconds = (run.finished_at - run.created_at).total_seconds() if run.finished_at else 0.0
    held_out = run.report.get("snapshot", {}).get("holdout", {})
    print_title(
        "Second act",
        f"a retrain on {plural(lesson.taught, 'labelled image')}, of which {held_out.get('real', 0)} real and "
        f"{held_out.get('fake', 0)} generated were only measured on: {seconds:.0f} s",
    )
    click.echo(f"The gate: {run.state}")
    for reason in run.reasons:
        click.echo(f"  {reason}")
    _print_knowledge(run.report.get("gate", {}))
    print_title("Before and after", "the same images, judged by the first champion and by what the gate let pass")
    rows = [
        {
            "made by": row.group,
            "images": row.images,
            "right before": f"{row.before:.1%}",
            "right after": None if row.after is None else f"{row.after:.1%}",
            "points": None if row.after is None else f"{100 * (row.after - row.before):+.1f}",
        }
        for row in by_group(lesson)
    ]
    print_table(rows, _CHANGES, empty="nothing was judged")
    if run.state != "promoted":
        click.echo("\nNothing changed: the champion of the first act judges on, and nothing was judged again.")


def _print_knowledge(gate: Mapping[str, Any]) -> None:
    """Prints what the gate could know of each group; a small hold-out hides much."""
    rows = {
        # What gained is in it twice: first as a gain, then among the groups that must not lose.
        change["group"]: {
            "made by": change["group"],
            "images": change["n"],
            "right before": f"{change['champion']:.1%}",
            "right after": f"{change['candidate']:.1%}",
            "loss that would have shown": _points(change["detectable"]),
        }
        for change in gate.get("changes", ())
        if change["condition"] == "clean" and change["figure"] == "accuracy" and "new" not in change["group"]
    }
    margin = max((loss["margin"] for loss in gate.get("losses", ())), default=0.0)
    if rows:
        print_title(
            "What the gate could know",
            f"by what was only measured on; it let pass what may have lost up to {100 * margin:.0f} points, since so "
            "few images cannot exclude the 2 points that are the default",
        )
        print_table(rows.values(), tuple(next(iter(rows.values()))), empty="")


def _points(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.0f} points"


def _print_checks(found: Iterable[tuple[str, bool]]) -> bool:
    passed = True
    for statement, holds in found:
        mark = Text("ok   ", style="green") if holds else Text("FAIL ", style="bold red")
        console().print(mark.append(statement, style="default"))
        passed = passed and holds
    return passed


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
    from code_worker.demo.directory import own_place  # what follows imports torch
    from code_worker.demo.first_act import run_demo

    console().print(Panel(_WARNING, title="code-worker demo", width=min(100, console().width)))
    began = time.perf_counter()
    with own_place(directory) as place:
        result = run_demo(place, images, _step, progress, learning=learning)
    console().print(Text(f"{time.perf_counter() - began:7.1f} s  in all", style="bold"))
    passed = print_report(result)
    _say_next(place, result)
    sys.exit(0 if passed else 1)


def _stop(_number: int, _frame: FrameType | None) -> None:
    """Stops like Ctrl-C: every `with` on the way stops what it started."""
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
