"""What `code-worker demo` prints in the end: tables counted from its database, and whether each check holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from code_worker.cli.output import console, plural, print_table

if TYPE_CHECKING:
    from code_worker.demo.learning import Lesson
    from code_worker.demo.run import Result

__all__ = ["print_report", "print_title"]

_SOURCES = ("made by", "images", "judged real", "judged fake", "right")
_CHANGES = ("made by", "images", "right before", "right after", "points")


def print_report(result: Result) -> bool:
    """Prints everything; whether every check holds."""
    from code_worker.demo.before_after import lesson_checks
    from code_worker.demo.findings import checks

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
    from code_worker.demo.before_after import by_group

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
    """What the gate could know of each group; a small hold-out hides much."""
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
