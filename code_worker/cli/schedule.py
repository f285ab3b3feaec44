"""`code-worker schedule`: when the detector learns by itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.arguments import json_option
from code_worker.cli.ledger import has_database, no_database, open_ledger, quiet_settings
from code_worker.cli.output import moment, print_json_lines, print_table, say

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Session
    from code_worker.store.runs import Run
    from code_worker.store.schedule import Slot
    from code_worker.store.workers import WorkerInfo

__all__ = ["schedule"]

_NEXT = 3
_OVERDUE = timedelta(minutes=10)


@click.group()
def schedule() -> None:
    """Show when retrains and refits are due, and whether a promotion has thresholds drawn anew."""


@schedule.command("list")
@json_option
def list_(*, as_json: bool) -> None:
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
    from code_worker.worker.report import silence_s

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
    from code_worker.store import runs
    from code_worker.store import schedule as table

    def read(session: Session) -> dict[str, tuple[Slot | None, Run | None]]:
        slots = {kind: table.last(session, kind) for kind in kinds}
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
