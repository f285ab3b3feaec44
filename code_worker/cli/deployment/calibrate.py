"""`code-worker calibrate`: set thresholds by labelled images, and anew after a promotion."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from code_worker.cli.common.arguments import SHARE_BETWEEN
from code_worker.cli.common.database import has_database, no_database, open_ledger, quiet_settings
from code_worker.cli.common.output import plural, print_json, print_json_lines, print_table, say, who
from code_worker.cli.common.progress import progress
from code_worker.cli.common.release_runtime import list_skipped, open_measured
from code_worker.errors import ConfigurationError
from code_worker.roles import Role, require

if TYPE_CHECKING:
    from code_worker.data.datasets.examples import Skipped
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.store.policies import PolicyRow
    from code_worker.training.evaluation.calibration import Calibration, Redrawn
    from code_worker.training.evaluation.thresholds import Shares


def draw_anew(*, dry_run: bool, as_json: bool) -> None:
    """Calibrates stale policies on the champion and says what became of each; exit status 1 when one stays stale.

    Raises:
        NotAllowedError: the caller is no operator.
        NoReleaseError: there is no champion.
    """
    from code_worker.plugins import load_plugins
    from code_worker.releases.registry import open_registry
    from code_worker.training.evaluation.calibration import recalibrate

    settings = quiet_settings()
    if not dry_run:
        require(settings.roles, who(), Role.OPERATOR, "set thresholds")
    with open_ledger(settings) as store, progress("drawing thresholds anew"):
        registry = open_registry(settings, store=store, plugins=load_plugins(settings))
        redrawn = recalibrate(settings, store, registry, by=who(), set_them=not dry_run)
    if as_json:
        print_json_lines(_redrawn_record(one) for one in redrawn)
    else:
        rows = [_readable(one) for one in redrawn]
        print_table(rows, ("scope", "head", "low", "high", "version", "problem"), empty="no policy is stale")
        if dry_run and redrawn:
            say("nothing was set (--dry-run)")
    if any(one.problem for one in redrawn):
        click.get_current_context().exit(1)


def _redrawn_record(one: Redrawn) -> dict[str, Any]:
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


_MAX_FNR: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Arguments of the command line."""

    source: str
    max_fpr: float
    max_fnr: float | None
    tenant: str | None
    content_type: str | None
    head: str | None
    release: str | None
    everything: bool
    note: str
    dry_run: bool
    as_json: bool


@click.command()
@click.argument("source", required=False)
@click.option("--max-fpr", type=SHARE_BETWEEN, help="Share of real images that may be called fake; must be given.")
@click.option("--max-fnr", type=SHARE_BETWEEN, help=f"Share of fakes that may be called real; unset: {_MAX_FNR:g}.")
@click.option("--tenant", help="Only this tenant's jobs; unset: every tenant's.")
@click.option("--content-type", help="Only jobs of this content type; unset: every one.")
@click.option("--head", help="Head to calibrate; unset: the one that judges there now.")
@click.option("--release", metavar="ID|DIR", help="Release to calibrate; unset: the champion.")
@click.option("--all", "everything", is_flag=True, help="Count labelled images that a retrain may have learned from.")
@click.option("--note", default="", help="Why, for the history.")
@click.option(
    "--after-promote", is_flag=True, help="Draw anew what was calibrated on another release than the champion."
)
@click.option("--dry-run", is_flag=True, help="Say what would be set, and set nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def calibrate(**words: Any) -> None:
    """Set thresholds so that few real images are called fake, by the labelled images of SOURCE.

    SOURCE is `labels:`, your labelled images, unless you name another (see `code-worker data --help`). Real images
    decide from where on an image is fake, generated ones below which it is real; between the two it is uncertain.
    Where there are too few generated ones for that, it stays where it was, unless you name --max-fnr.
    Of your labelled images only the hold-out counts: those that a retrain may have learned from look too good.

    The thresholds become the next version of the policy, with the data and the figures recorded.

    With --after-promote every policy in force that was calibrated on another release than the champion is drawn anew:
    by the same SOURCE, bounds, head and scope as then.

    Exit status: 0 done; 1 too few images, or none that can be used; 2 wrong use.
    """
    if words.pop("after_promote"):
        _after_promote(words)
        return
    if words["max_fpr"] is None:
        raise click.UsageError("say with --max-fpr what share of real images may be called fake")
    _calibrate_one(_Asked(**{**words, "source": words["source"] or "labels:"}))


def _after_promote(words: dict[str, Any]) -> None:

    dry_run, as_json = words.pop("dry_run"), words.pop("as_json")
    if given := sorted(name for name, value in words.items() if value):
        raise click.UsageError(f"--after-promote does as each policy was calibrated: leave {', '.join(given)} out")
    draw_anew(dry_run=dry_run, as_json=as_json)


def _calibrate_one(asked: _Asked) -> None:
    if "" in {asked.tenant, asked.content_type}:
        raise click.UsageError("an empty name stands for nothing: leave the option out")
    settings = quiet_settings()
    if not asked.dry_run:
        require(settings.roles, who(), Role.OPERATOR, "set thresholds")
    if not (asked.dry_run or has_database(settings)):
        raise ConfigurationError(f"{no_database(settings)}; or try --dry-run, which needs none")
    with open_ledger(settings) if has_database(settings) else nullcontext() as store:
        calibration = _calibrated(asked, settings, store)
        row = None if asked.dry_run or store is None else _put(asked, settings, store, calibration)
        if row is not None and store is not None:
            _warn_of_another_champion(store, calibration.evidence["release"])
    if asked.as_json:
        print_json(_record(asked, calibration, row))
    else:
        _say(asked, calibration, row)


def _calibrated(asked: _Asked, settings: Settings, store: Store | None) -> Calibration:
    from code_worker.data.datasets.open import open_examples
    from code_worker.training.evaluation.calibration import Goal, calibrate, learnable

    skipped: list[Skipped] = []
    goal = Goal(max_fpr=asked.max_fpr, max_fnr=asked.max_fnr or _MAX_FNR, strict_fnr=asked.max_fnr is not None)
    with ExitStack() as closing:
        closing.callback(list_skipped, skipped)
        with progress(f"reading {asked.source}"):
            examples = list(open_examples(asked.source, settings=settings, skipped=skipped, store=store))
        measured = closing.enter_context(open_measured(settings, asked.release))
        before = measured.policies.find(asked.tenant, asked.content_type, measured.runtime.default_policy)
        with progress(f"calibrating {measured.loaded.id}", total=len(examples)) as advance:
            made = calibrate(
                examples,
                measured.runtime,
                settings.limits,
                goal,
                head=asked.head or before.head or measured.runtime.default_head,
                before=before,
                source=asked.source,
                labelled=None if asked.everything or store is None else learnable(store, measured.loaded.id),
                keep_low=store is None or not _low_is_of_another(store, before.id, measured.loaded.id),
                known=measured.known,
                keep=measured.keep,
                threads=settings.worker.fetch_threads,
                progress=advance,
            )
        skipped.extend(made.skipped)
        return made


def _low_is_of_another(store: Store, policy: str, release: str) -> bool:
    """Returns whether a policy's lower border was drawn by another release's scores."""
    from code_worker.store import policies

    stale = store.run(lambda session: policies.stale(session, release), write=False)
    return any(row.id == policy and not (row.evidence or {}).get("low_kept") for row in stale)


def _put(asked: _Asked, settings: Settings, store: Store, made: Calibration) -> PolicyRow:
    from code_worker.store.policies import put_policy

    return put_policy(
        settings,
        store,
        by=who(),
        low=made.made.low,
        high=made.made.high,
        tenant=asked.tenant,
        content_type=asked.content_type,
        # Thresholds of one head mean nothing for another.
        head=made.head,
        note=asked.note or f"calibrated on {asked.source} for at most {asked.max_fpr:g} false alarms",
        evidence=made.evidence,
        release_id=made.evidence["release"],
    )


def _warn_of_another_champion(store: Store, release: str) -> None:
    from code_worker.store import releases

    champion = store.run(lambda session: releases.alias(session, "champion"), write=False)
    if champion != release:
        say(f"{release} is not the champion: until it is, {champion or 'none'} judges by its thresholds", err=True)


def _record(asked: _Asked, made: Calibration, row: PolicyRow | None) -> dict[str, Any]:
    return {
        "set": row is not None,
        "policy": None if row is None else row.id,
        "version": None if row is None else row.version,
        "tenant": asked.tenant,
        "content_type": asked.content_type,
        "head": made.head,
        "low": made.made.low,
        "high": made.made.high,
        "before": {
            "policy": made.before.id,
            "low": made.before.low,
            "high": made.before.high,
            **made.shares_before.to_dict(),
        },
        "evidence": made.evidence,
        "skipped": [{"key": one.key, "reason": one.reason} for one in made.skipped],
    }


def _say(asked: _Asked, made: Calibration, row: PolicyRow | None) -> None:
    rows = [
        {
            "": "before",
            "low": f"{made.before.low:.4f}",
            "high": f"{made.before.high:.4f}",
            **_cells(made.shares_before),
        },
        {"": "now", "low": f"{made.made.low:.4f}", "high": f"{made.made.high:.4f}", **_cells(made.made.shares)},
    ]
    evidence = made.evidence
    say(
        f"head {made.head} of {evidence['release']} on {evidence['real']} real and "
        f"{plural(evidence['fake'], 'fake image')} of "
        f"{asked.source}; shares in percent, with 95 % intervals"
    )
    print_table(rows, tuple(rows[0]), empty="")
    if learned := evidence["left_out"]["learned"]:
        say(f"{plural(learned, 'image')} left out: a retrain may have learned from them (--all counts them)")
    if made.made.note:
        say(made.made.note)
    if made.made.warning:
        say(f"warning: {made.made.warning}", err=True)
    if row is None:
        say("nothing was set (--dry-run)")
    else:
        say(f"version {row.version} for {row.scope}: workers take it over")


def _cells(shares: Shares) -> dict[str, str]:
    titles = {
        "fpr": "reals called fake",
        "tpr": "fakes found",
        "fnr": "fakes called real",
        "uncertain_real": "reals uncertain",
        "uncertain_fake": "fakes uncertain",
    }
    return {title: _cell(getattr(shares, name)) for name, title in titles.items()}


def _cell(share: Mapping[str, float] | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share['value']:.1f} [{100 * share['low']:.1f} {100 * share['high']:.1f}]"
