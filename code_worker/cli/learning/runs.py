"""`code-worker runs` and `schedule`: what learned when, from what, how it ended, and when the next is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.common.arguments import ID, json_option, limit_option
from code_worker.cli.common.database import has_database, no_database, open_ledger, quiet_settings
from code_worker.cli.common.output import moment, plural, print_facts, print_json, print_json_lines, print_table, say
from code_worker.errors import StoreError

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Session
    from code_worker.store.learning.runs import Run, RunMetrics, Slot
    from code_worker.store.workers import WorkerInfo

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
    from code_worker.store.learning import runs as table

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
    from code_worker.store.learning import runs as table

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
    """Prints how a run stands, in a few lines."""
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
    """Prints what may have been lost unseen, and how much chance of error the champion has left."""
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


_NEXT = 3
_OVERDUE = timedelta(minutes=10)


@click.group()
def schedule() -> None:
    """Show when retrains and refits are due, and whether a promotion has thresholds drawn anew."""


@schedule.command("list")
@json_option
def list_schedules(*, as_json: bool) -> None:
    """List the schedules: cron line, next times in UTC, the last time and what came of it."""
    from code_worker.worker.schedule import CALIBRATE, TASKS, schedules

    settings, kinds = quiet_settings(), (*TASKS, CALIBRATE)
    crons, now, last = schedules(settings), datetime.now(UTC), _last(settings, kinds)
    rows = [_row(settings, kind, crons.get(kind), now, last.get(kind, (None, None))) for kind in kinds]
    learning = _learning_parts(settings)
    if learning is None:
        say(no_database(settings), err=True)
    for row in rows:
        row["restart"] = [_named(part) for part in learning or () if _has_another(settings, part, row["schedule"])]
    if as_json:
        print_json_lines(rows)
        return
    print_table([_readable(row) for row in rows], ("schedule", "cron", "next", "last", "outcome", "run"), empty="")
    _warn(settings, rows, learning)


def _warn(settings: Settings, rows: Sequence[dict[str, Any]], learning: Sequence[WorkerInfo] | None) -> None:
    """Says on stderr why a schedule that is listed may not fire."""
    for row in rows:
        for part in row["restart"]:
            click.echo(
                f"{row['schedule']}: {part} runs with another one: restart it, so that it reads this", err=True
            )
    wanted = any(getattr(settings.schedule, row["schedule"]) for row in rows)
    if wanted and learning is not None and not any(part.role == "trainer" for part in learning):
        click.echo("no trainer was heard of: start `code-worker trainer`, or `code-worker up`", err=True)
    for row in rows:
        if row["overdue"] is not None:
            click.echo(
                f"{row['schedule']} was due at {moment(row['overdue'])}: does a `code-worker trainer` run?", err=True
            )


def _learning_parts(settings: Settings) -> list[WorkerInfo] | None:
    """Trainers and beats that were heard of lately; None where there is no database yet."""
    if not has_database(settings):
        return None
    from code_worker.store import workers
    from code_worker.worker.background import silence_s

    with open_ledger(settings) as store:
        alive = store.run(
            lambda session: workers.alive(session, within_s=silence_s(settings), role=None), write=False
        )
    return [part for part in alive if part.role in {"trainer", "beat"}]


def _has_another(settings: Settings, part: WorkerInfo, kind: str) -> bool:
    said = part.info.get("schedule", {})
    return kind in said and said[kind] != getattr(settings.schedule, kind)


def _named(part: WorkerInfo) -> str:
    return f"{part.role} {part.host}:{part.pid}, since {moment(part.started_at)},"


def _row(
    settings: Settings, kind: str, cron: Any, now: datetime, last: tuple[Slot | None, Run | None]
) -> dict[str, Any]:
    from code_worker.worker.schedule import times_from, times_until

    slot, run = last
    missed = None if cron is None or slot is None else next(times_until(cron, now), None)
    overdue = missed is not None and slot is not None and slot.slot < missed and now - missed > _OVERDUE
    return {
        "schedule": kind,
        "cron": _when(getattr(settings.schedule, kind)),
        "next": [] if cron is None else list(islice(times_from(cron, now), _NEXT)),
        "last": None if slot is None else slot.slot,
        "outcome": _outcome(slot, run),
        "run": None if slot is None else slot.run_id,
        "overdue": missed if overdue else None,
    }


def _when(setting: str | bool | None) -> str | None:
    return "after a promotion" if setting is True else setting or None


def _last(settings: Settings, kinds: Sequence[str]) -> dict[str, tuple[Slot | None, Run | None]]:
    if not has_database(settings):
        return {}
    from code_worker.store.learning import runs
    from code_worker.store.learning import runs as table

    def read(session: Session) -> dict[str, tuple[Slot | None, Run | None]]:
        slots = {kind: table.last_slot(session, kind) for kind in kinds}
        return {
            kind: (slot, None if slot is None or slot.run_id is None else runs.get(session, slot.run_id))
            for kind, slot in slots.items()
        }

    with open_ledger(settings) as store:
        return store.run(read, write=False)


def _outcome(slot: Slot | None, run: Run | None) -> str | None:
    if slot is None or run is None:
        return None if slot is None else slot.outcome
    return run.state


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    unset = f"not set: CODE_WORKER_SCHEDULE__{row['schedule'].upper()}"
    return {
        **row,
        "cron": row["cron"] or unset,
        "next": moment(next(iter(row["next"]), None)),
        "last": moment(row["last"]),
    }
