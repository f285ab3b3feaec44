"""`code-worker calibrate --after-promote`: thresholds of another champion's, drawn anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.ledger import open_ledger, quiet_settings
from code_worker.cli.output import print_json_lines, print_table, say
from code_worker.cli.progress import progress
from code_worker.cli.who import who
from code_worker.roles import Role, require

if TYPE_CHECKING:
    from code_worker.training.recalibrate import Redrawn

__all__ = ["draw_anew"]


def draw_anew(*, dry_run: bool, as_json: bool) -> None:
    """Calibrates stale policies on the champion and says what became of each; exit status 1 when one stays stale.

    Raises:
        NotAllowedError: whoever runs this is no operator.
        NoReleaseError: there is no champion.
    """
    from code_worker.plugins import load_plugins
    from code_worker.releases.registry import open_registry
    from code_worker.training.recalibrate import recalibrate

    settings = quiet_settings()
    if not dry_run:
        require(settings.roles, who(), Role.OPERATOR, "set thresholds")
    with open_ledger(settings) as store, progress("drawing thresholds anew"):
        registry = open_registry(settings, store=store, plugins=load_plugins(settings))
        redrawn = recalibrate(settings, store, registry, by=who(), set_them=not dry_run)
    if as_json:
        print_json_lines(_record(one) for one in redrawn)
    else:
        rows = [_readable(one) for one in redrawn]
        print_table(rows, ("scope", "head", "low", "high", "version", "problem"), empty="no policy is stale")
        if dry_run and redrawn:
            say("nothing was set (--dry-run)")
    if any(one.problem for one in redrawn):
        click.get_current_context().exit(1)


def _record(one: Redrawn) -> dict[str, Any]:
    thresholds = None if one.made is None else one.made.made
    return {
        "tenant": one.policy.tenant,
        "content_type": one.policy.content_type,
        "head": one.policy.head,
        "before": {
            "policy": one.policy.id,
            "release": one.policy.release_id,
            "low": one.policy.low,
            "high": one.policy.high,
        },
        "low": None if thresholds is None else thresholds.low,
        "high": None if thresholds is None else thresholds.high,
        "policy": None if one.row is None else one.row.id,
        "version": None if one.row is None else one.row.version,
        "evidence": None if one.made is None else one.made.evidence,
        "problem": one.problem or None,
    }


def _readable(one: Redrawn) -> dict[str, Any]:
    made = None if one.made is None else one.made.made
    return {
        "scope": one.policy.scope,
        "head": one.policy.head,
        "low": f"{one.policy.low:.4f}" + (f" → {made.low:.4f}" if made else ""),
        "high": f"{one.policy.high:.4f}" + (f" → {made.high:.4f}" if made else ""),
        "version": one.row.version if one.row else "",
        "problem": one.problem,
    }
