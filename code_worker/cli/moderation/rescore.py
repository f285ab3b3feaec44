"""`code-worker rescore`: judge history again."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

from code_worker.cli.common.arguments import AGO_OR_DATE, json_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import plural, print_json, print_table, say, who
from code_worker.cli.common.progress import progress
from code_worker.cli.common.records import RETRY_HELPS
from code_worker.types import Label, RejectReason

if TYPE_CHECKING:
    from code_worker.moderation.rescore import RescoreTally

_MOVED_ON: Final = "moved_on"
_LEFT: Final = {
    "head_missing": "the release has no such head: name one with --head",
    "head_failed": "the head failed on this image: see the log",
    "select_head_failed": "a plugin's select_head failed: see the log",
    _MOVED_ON: "retried or judged again by somebody else meanwhile",
    "content_changed": "the source has other bytes now, and no copy was kept",
    "not_found": "the source has it no more, and no copy was kept",
}


@click.command()
@click.option(
    "--since", type=AGO_OR_DATE, required=True, help="Images accepted from then on: 2026-01-31, 7d or 12h; UTC."
)
@click.option("--until", type=AGO_OR_DATE, help="Images accepted before then: 2026-01-31, 7d or 12h; UTC.")
@click.option("--tenant", help="Whose images.")
@click.option("--label", type=click.Choice([str(one) for one in Label]), help="Only what is held to be this now.")
@click.option("--release", help="Release to judge with; unset: the champion.")
@click.option("--head", help="Head for every image; unset: chosen as when a job is judged.")
@click.option("--limit", type=click.IntRange(1), help="So many new verdicts at most.")
@click.option("--dry-run", is_flag=True, help="Judge, but write nothing.")
@json_option
def rescore(
    *,
    since: datetime,
    until: datetime | None,
    tenant: str | None,
    label: str | None,
    release: str | None,
    head: str | None,
    limit: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Judge again what has a verdict; new verdicts name the old ones, which stay.

    Stored embeddings are used where the release's encoder made them; other images are fetched again, or read from
    the copy in the dataset storage, and count only with the bytes that were judged. Begun again, it goes on where it
    ended: what this release, head and policy said already is left as it is. Rejected images are not looked at: see
    `jobs retry`. Exit status 1: some verdicts were left, because their images could not be judged again.
    """
    from code_worker.store.verdicts import RescoreFilter
    from code_worker.worker.judging.rescore_run import rescore as judge_again

    settings = quiet_settings()
    wanted = RescoreFilter(since, until, tenant, Label(label) if label else None)
    with open_ledger(settings) as store, progress("judging history again", counted=True) as advance:
        used, tally = judge_again(
            settings,
            store,
            wanted,
            release=release,
            head=head,
            limit=limit,
            dry_run=dry_run,
            by=who(),
            progress=advance,
        )
    if as_json:
        print_json({"release": used, "dry_run": dry_run, **tally.to_dict()})
    else:
        _say(used, tally, dry_run=dry_run)
    sys.exit(1 if set(tally.left) - {_MOVED_ON} else 0)


def _say(release: str, tally: RescoreTally, *, dry_run: bool) -> None:
    facts = tally.to_dict()
    verb = "would be" if dry_run else "was" if tally.rescored == 1 else "were"
    say(
        f"{plural(tally.examined, 'verdict')} looked at, {tally.rescored} {verb} given again by {release}; "
        f"{plural(tally.unchanged, 'says', 'say')} so already"
    )
    if tally.rescored:
        say(f"scores moved by {facts['mean_shift']:+.4f} on average", "")
        rows = [{"before": was, **{f"now {now}": tally.transitions[was][now] for now in Label}} for was in Label]
        print_table(rows, ("before", *(f"now {now}" for now in Label)), empty="")
    if tally.left:
        say("", "left as they are")
        left: list[dict[str, Any]] = [
            {"images": number, "reason": reason, "what it means": _LEFT.get(reason) or _of_rejection(reason)}
            for reason, number in tally.left.most_common()
        ]
        print_table(left, ("images", "reason", "what it means"), empty="")


def _of_rejection(reason: str) -> str:
    return f"does another try help? {RETRY_HELPS[RejectReason(reason)]}"
