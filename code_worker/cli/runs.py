"""`code-worker runs`: what learned when, from what, and how it ended."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.arguments import ID, json_option, limit_option
from code_worker.cli.ledger import open_ledger
from code_worker.cli.output import plural, print_facts, print_json, print_json_lines, print_table, say
from code_worker.errors import StoreError

if TYPE_CHECKING:
    from code_worker.store.runs import Run, RunMetrics

__all__ = ["run_record", "runs", "say_run"]

_NONE = "no run yet: code-worker retrain, or set CODE_WORKER_SCHEDULE__RETRAIN"
_STATES = ("running", "promoted", "rejected", "failed", "skipped")


@click.group()
def runs() -> None:
    """List and show retrains and refits."""


@runs.command("list")
@click.option("--kind", type=click.Choice(["retrain", "refit"]), help="Only these.")
@click.option("--state", type=click.Choice(_STATES), help="Only those that are, or ended, so.")
@click.option("--after", type=ID, help="Continue after this id of the page before.")
@limit_option(20)
@json_option
def list_(*, kind: str | None, state: str | None, after: str | None, limit: int, as_json: bool) -> None:
    """List runs, newest first."""
    from code_worker.store import runs as table

    with open_ledger() as store:
        found = store.run(
            lambda session: table.list_runs(session, kind=kind, state=state, after=after, limit=limit), write=False
        )
    if as_json:
        print_json_lines(run_record(run) for run in found)
        return
    rows = [{**asdict(run), "why": next(iter(run.reasons), "")} for run in found]
    print_table(rows, ("id", "kind", "state", "stage", "created_at", "by", "candidate", "why"), empty=_NONE)


@runs.command()
@click.argument("run", type=ID)
@json_option
def show(run: str, *, as_json: bool) -> None:
    """Show one run: its snapshot, the gate's comparison, and its curves (--json: all of it)."""
    from code_worker.store import runs as table

    with open_ledger() as store:
        found, points = store.run(lambda session: (table.get(session, run), table.metrics(session, run)), write=False)
    if found is None:
        raise StoreError(f"no run {run}: see `code-worker runs list`")
    if as_json:
        print_json({**run_record(found), "metrics": [asdict(point) for point in points]})
        return
    say_run(found)
    _print_facts(found)
    _print_comparison(found)
    _print_curve(points)


def run_record(run: Run) -> dict[str, Any]:
    """A run as plain values."""
    return asdict(run)


def say_run(run: Run) -> None:
    """How a run stands, in a few lines."""
    say(f"{run.kind} {run.id}: {_standing(run)}")
    if heads := run.report.get("heads"):
        say(f"  heads fitted: {', '.join(_head(name, options) for name, options in heads.items())}")
    for reason in run.reasons:
        say(f"  {reason}")


def _head(name: str, options: dict[str, Any]) -> str:
    given = ", ".join(f"{option} {value}" for option, value in options.items())
    return f"{name} ({given})" if given else name


def _standing(run: Run) -> str:
    match run.state:
        case "running":
            return f"under way, {run.stage}"
        case "promoted" if run.report.get("alias") == "challenger":
            return f"{run.candidate} became the challenger; the champion stays"
        case "promoted":
            return f"promoted {run.candidate}; running workers take it over within seconds"
        case "rejected":
            return f"{run.candidate} is not promoted; the champion stays"
        case "skipped":
            return "nothing to do yet"
        case _:
            return "failed; the champion stays"


def _print_facts(run: Run) -> None:
    skipped = run.report.get("skipped", {}).get("images")
    learned = sum(run.report.get("gate", {}).get("learned", {}).values())
    unjudged = f"{plural(learned, 'image')} of the hold-out that a release learned from"
    print_facts(
        {
            "by": run.by,
            "started": run.created_at,
            "ended": run.finished_at,
            "last sign of life": run.heartbeat_at if run.finished_at is None else None,
            "attempts": run.attempts,
            "champion then": run.base_release,
            "candidate": run.candidate,
            "snapshot": run.snapshot_id,
            "unreadable images": skipped or None,
            "not judged on": unjudged if learned else None,
        }
    )


def _print_comparison(run: Run) -> None:
    changes = run.report.get("gate", {}).get("changes", ())
    rows = [
        {
            "group": change["group"],
            "condition": change["condition"],
            "images": change["n"],
            "figure": change["figure"].replace("_", " "),
            "champion": f"{change['champion']:.3f}",
            "candidate": f"{change['candidate']:.3f}",
            "95_%_of_the_difference": f"{change['difference']['low']:+.3f} to {change['difference']['high']:+.3f}",
            "p": f"{change['p']:.2g}" if "p" in change else "",
            "loss_that_would_show": _share(change.get("detectable")),
        }
        for change in changes
    ]
    if rows:
        print_table(rows, tuple(rows[0]), empty="")
    _print_evidence(run)


def _print_evidence(run: Run) -> None:
    """What may have been lost unseen, and what the champion's reign has left to err."""
    gate = run.report.get("gate", {})
    rows = [
        {
            "group": loss["group"],
            "condition": loss["condition"],
            "images": loss["n"],
            "change": f"{loss['value']:+.3f}",
            "lost_at_most": f"{max(0.0, -loss['low']):.3f}",
            "allowed": f"{loss['margin']:g}",
        }
        for loss in gate.get("losses", ())
    ]
    if rows:
        print_table(rows, tuple(rows[0]), empty="")
    if spending := gate.get("spending"):
        say(
            f"comparison {spending['before'] + 1} with this champion: {spending['level']:.2%} of the "
            f"{spending['error']:.0%} that an equal release may pass by luck in its reign, {spending['left']:.2%} "
            f"are left, {spending['left_now']:.2%} of them on this hold-out; the rest opens as it grows"
        )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _print_curve(points: list[RunMetrics]) -> None:
    rows = [
        {"epoch": point.epoch, "step": point.step, **{name: f"{value:.4g}" for name, value in _main(point).items()}}
        for point in points
    ]
    if rows:
        print_table(rows, tuple(rows[0]), empty="")


def _main(point: RunMetrics) -> dict[str, float]:
    """The few figures of an epoch that fit into a line."""
    wanted = ("loss", "linear", "linear/clean/mean", "linear/transformed/mean")
    return {name: point.metrics[name] for name in wanted if name in point.metrics}
