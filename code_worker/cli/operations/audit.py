"""`code-worker audit`: who changed what, and whether that record is whole."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

from code_worker.cli.common.arguments import AGO_OR_DATE, ParamType, json_option, limit_option
from code_worker.cli.common.database import open_ledger
from code_worker.cli.common.output import plural, print_json, print_json_lines, print_table, say

if TYPE_CHECKING:
    from code_worker.store.audit import Entry, Verified

_HEAD: Final = re.compile(r"(\d{1,18}):([0-9a-f]{64})")


class _Head(ParamType):
    """An entry as `audit verify` names the last one: number, colon, hash."""

    name = "seq:hash"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, str]:
        if (match := _HEAD.fullmatch(value)) is None:
            self.fail(f"{value!r} is no entry: write the SEQ:HASH that `audit verify` printed", param, ctx)
        return int(match[1]), match[2]


@click.group()
def audit() -> None:
    """Show who changed what, and check that nothing of that record was changed or removed."""


@audit.command("list")
@click.option("--actor", help="Who did it.")
@click.option("--action", help="What was done: release.promote, label.add, …; `release.` is all that begin so.")
@click.option("--subject", help="To what: the id of a release or policy, `file NAME`, …")
@click.option("--since", type=AGO_OR_DATE, help="From then on: 2026-01-31, 7d or 12h; UTC.")
@click.option("--until", type=AGO_OR_DATE, help="Before then: 2026-01-31, 7d or 12h; UTC.")
@click.option("--after", type=click.IntRange(1), metavar="SEQ", help="Continue after this entry: the next page.")
@limit_option(50)
@json_option
def list_(
    *,
    actor: str | None,
    action: str | None,
    subject: str | None,
    since: datetime | None,
    until: datetime | None,
    after: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """List entries, newest first."""
    from code_worker.store import audit as table

    wanted = table.AuditFilter(actor, action, subject, since, until)
    with open_ledger() as store:
        found = store.run(
            lambda session: table.list_entries(session, wanted, after=after, limit=limit + 1), write=False
        )
    page = found[:limit]
    if as_json:
        print_json_lines(_record(entry) for entry in page)
    else:
        columns = ("seq", "at", "actor", "action", "subject", "details")
        print_table([asdict(entry) for entry in page], columns, empty="nothing was recorded")
    if len(found) > limit:
        say(f"more: --after {page[-1].seq}", err=True)


def _record(entry: Entry) -> dict[str, Any]:
    return {**asdict(entry), "details": json.loads(entry.details)}


@audit.command()
@click.option(
    "--head", type=_Head(), help="An entry noted earlier, as SEQ:HASH, that must still be there: ends cut off show."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(*, head: tuple[int, str] | None, as_json: bool) -> None:
    """Walk along the chain of entries; exit status 1 where it was changed, or entries are missing.

    Prints the last entry as SEQ:HASH. Keep it where nobody who can write to the database can: only beside it does a
    cut at the end, or a chain computed anew, show.
    """
    from code_worker.store import audit as table

    with open_ledger() as store:
        found = table.verify(store, head=head)
    if as_json:
        print_json({**asdict(found), "whole": not found.flaws})
    else:
        _say(found)
    sys.exit(1 if found.flaws else 0)


def _say(found: Verified) -> None:
    for flaw in found.flaws:
        say(f"entry {flaw.seq}: {flaw.problem}", err=True)
    if found.flaws:
        say(f"FAILED: {plural(len(found.flaws), 'flaw')} in {plural(found.entries, 'entry', 'entries')}", err=True)
    else:
        say(f"{plural(found.entries, 'entry', 'entries')}, whole; the last is {found.entries}:{found.hash}")
