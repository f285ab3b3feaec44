"""`code-worker policies`: thresholds per tenant and content type."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.common.arguments import json_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import print_json, print_json_lines, print_table, say, who
from code_worker.errors import UnknownHeadError

if TYPE_CHECKING:
    from code_worker.store.engine import Session, Store
    from code_worker.store.policies import PolicyRow

_PUBLISHED = "no policy: every job gets the published decision (score >= 0.5 is fake, never uncertain)"
_THRESHOLD = click.FloatRange(0, 1)


@click.group()
def policies() -> None:
    """Show and set thresholds: `score >= high` is fake, `score < low` real, between the two uncertain."""


@policies.command("list")
@click.option("--history", is_flag=True, help="Show superseded versions of the scope as well.")
@click.option("--tenant", help="Scope of the history; unset: every tenant.")
@click.option("--content-type", help="Scope of the history; unset: every content type.")
@json_option
def list_(*, history: bool, tenant: str | None, content_type: str | None, as_json: bool) -> None:
    """List the policies in force; the most specific one applies: tenant and type, tenant, type, all.

    A policy is stale when it was calibrated on another release than the champion: its thresholds mean other scores.
    """
    from code_worker.store import policies as table
    from code_worker.store import releases

    if (tenant or content_type) and not history:
        raise click.UsageError("--tenant and --content-type choose a scope for --history")

    def read(session: Session) -> tuple[list[PolicyRow], set[str], str | None]:
        rows = (
            table.history(session, tenant=tenant, content_type=content_type) if history else table.in_force(session)
        )
        champion = releases.alias(session, releases.CHAMPION)
        return rows, {row.id for row in table.stale(session, champion)}, champion

    with open_ledger() as store:
        found, stale, champion = store.run(read, write=False)
    if as_json:
        print_json_lines({**asdict(row), "stale": row.id in stale} for row in found)
        return
    columns = (
        "tenant",
        "content_type",
        "head",
        "low",
        "high",
        "version",
        "calibrated_on",
        "created_at",
        "created_by",
    )
    print_table([_readable(row, row.id in stale) for row in found], (*columns, "note"), empty=_PUBLISHED)
    if stale & {row.id for row in found}:
        say(
            f"stale: the champion is {champion}; draw them anew with `code-worker calibrate --after-promote`",
            err=True,
        )


def _readable(row: PolicyRow, stale: bool) -> dict[str, Any]:
    return {
        **asdict(row),
        "calibrated_on": f"{row.release_id or ''}{' (stale)' if stale else ''}",
        "tenant": row.tenant or "(all)",
        "content_type": row.content_type or "(all)",
        "created_at": f"{row.created_at:%Y-%m-%d %H:%M}",
    }


@policies.command("set")
@click.option("--tenant", help="Only this tenant's jobs; unset: every tenant's.")
@click.option("--content-type", help="Only jobs of this content type; unset: every one.")
@click.option("--head", help="Judge them with this head; unset: leave the choice to others.")
@click.option("--low", type=_THRESHOLD, required=True, help="Below this score: real.")
@click.option("--high", type=_THRESHOLD, required=True, help="From this score on: fake.")
@click.option("--note", default="", help="Why, for the history.")
@json_option
def set_(
    *,
    tenant: str | None,
    content_type: str | None,
    head: str | None,
    low: float,
    high: float,
    note: str,
    as_json: bool,
) -> None:
    """Put thresholds in force; verdicts from now on carry them, those written before keep theirs."""
    from code_worker.store.policies import put_policy

    if not low <= high:  # also false for NaN
        raise click.UsageError(f"--low {low:g} is not below or at --high {high:g}")
    if "" in {tenant, content_type, head}:
        raise click.UsageError("an empty name stands for nothing: leave the option out")
    settings = quiet_settings()
    with open_ledger(settings) as store:
        if head is not None:
            _check_head(store, head)
        made = put_policy(
            settings,
            store,
            by=who(),
            low=low,
            high=high,
            tenant=tenant,
            content_type=content_type,
            head=head,
            note=note,
        )
    if as_json:
        print_json(asdict(made))
        return
    say(f"version {made.version} for {made.scope}: real below {low:g}, fake from {high:g}; workers take it over")


def _check_head(store: Store, head: str) -> None:
    from code_worker.store import releases as table

    def champions_heads(session: Session) -> tuple[str, ...] | None:
        name = table.alias(session, "champion")
        found = None if name is None else table.get(session, name)
        return None if found is None else tuple(sorted(found.manifest.get("heads", ())))

    known = store.run(champions_heads, write=False)
    if known is not None and head not in known:
        raise UnknownHeadError(head, known)
