"""`code-worker shadow`: what the challenger would have said."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.common.arguments import AGO_OR_DATE, json_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import plural, print_json, print_table, say
from code_worker.types import Label

if TYPE_CHECKING:
    from code_worker.moderation.shadow import ShadowReport
    from code_worker.settings import LabelSettings
    from code_worker.store.engine import Session
    from code_worker.store.learning.challenger_scores import ShadowFilter

_SCOPE_COLUMNS = ("tenant", "content_type", "images", "agreement", "shift")
_DISAGREEMENT_COLUMNS = ("champion", "challenger", "uri", "job")
_NEVER = "nothing was scored in shadow yet: code-worker releases challenge RELEASE"


@click.group()
def shadow() -> None:
    """Compare the challenger, which never acts, with the champion."""


@shadow.command()
@click.option("--release", help="Challenger to look at; unset: that of now, else the last one.")
@click.option("--since", type=AGO_OR_DATE, help="Scores from then on: 2026-01-31, 7d or 12h; UTC.")
@click.option("--until", type=AGO_OR_DATE, help="Scores before then: 2026-01-31, 7d or 12h; UTC.")
@click.option("--tenant", help="Whose images.")
@click.option("--content-type", help="Kind of content.")
@click.option("--limit", type=click.IntRange(0, 10_000), default=10, show_default=True, help="Disagreements to list.")
@json_option
def report(
    *,
    release: str | None,
    since: datetime | None,
    until: datetime | None,
    tenant: str | None,
    content_type: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Say how often champion and challenger agree, where they differ most, and who was right where people know."""
    from code_worker.store import releases
    from code_worker.store.learning import challenger_scores as table

    settings = quiet_settings()
    with open_ledger(settings) as store:

        def read(session: Session) -> ShadowReport | None:
            wanted = release or releases.alias(session, releases.CHALLENGER) or table.last(session)
            if wanted is None:
                return None
            chosen = table.ShadowFilter(wanted, since, until, tenant, content_type)
            return _report(session, chosen, settings.labels, limit)

        found = store.run(read, write=False)
    if as_json:
        if found is not None:
            print_json(found.to_dict())
    elif found is None:
        say(_NEVER)
    else:
        _say(found)


def _report(session: Session, wanted: ShadowFilter, rule: LabelSettings, limit: int) -> ShadowReport:
    from code_worker.moderation.shadow import compare_with_labels, summarise
    from code_worker.store.learning import challenger_scores as table
    from code_worker.store.learning import labels

    said = table.labelled(session, wanted)
    known = labels.resolve(session, rule=rule.rule, trusted=rule.trusted, ignored=rule.ignored) if said else []
    right = compare_with_labels(said, {label.sha256: label.label for label in known})
    most = table.disagreements(session, wanted, limit=limit) if limit else []
    return summarise(wanted.release, table.tally(session, wanted), right, most)


def _say(report: ShadowReport) -> None:
    if report.agreement is None or report.shift is None:
        say(f"challenger {report.release} has scored nothing that matches")
        return
    say(f"challenger {report.release} beside {', '.join(report.champions)}: {plural(report.images, 'image')}")
    say(f"they agree on {report.agreement:.2%}; its scores are {report.shift:+.4f} away on average")
    say("", "labels, champion down, challenger across")
    rows = [{"champion": was, **{now: report.confusion[was][now] for now in Label}} for was in Label]
    print_table(rows, ("champion", *Label), empty="")
    if len(report.scopes) > 1:
        say("", "by tenant and content type")
        print_table(map(_scope_row, report.scopes), _SCOPE_COLUMNS, empty="")
    _say_labelled(report)
    if report.disagreements:
        say("", "where they differ most")
        print_table(map(_disagreement_row, report.disagreements), _DISAGREEMENT_COLUMNS, empty="")


def _say_labelled(report: ShadowReport) -> None:
    known = report.labelled
    if not known.images:
        say("", "none of these images is labelled, so nobody knows who is right: code-worker label")
        return
    say(
        f"\nof {plural(known.images, 'labelled image')} both are right on {known.both}, only the champion on "
        f"{known.only_champion}, only the challenger on {known.only_challenger}, neither on {known.neither}"
    )


def _scope_row(scope: Any) -> dict[str, Any]:
    return {
        "tenant": scope.tenant or "(none)",
        "content_type": scope.content_type or "(none)",
        "images": scope.images,
        "agreement": f"{scope.agreement:.2%}",
        "shift": f"{scope.shift:+.4f}",
    }


def _disagreement_row(one: Any) -> dict[str, Any]:
    return {
        "champion": f"{one.champion_label} {one.champion_score:.3f} {one.champion_head}",
        "challenger": f"{one.label} {one.score:.3f} {one.head}",
        "uri": one.uri,
        "job": one.job_id,
    }
