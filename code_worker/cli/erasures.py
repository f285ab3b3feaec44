"""`code-worker erasures`: receipts, and whether something was erased."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.arguments import ID, SHA256, json_option, limit_option
from code_worker.cli.ledger import open_ledger, quiet_settings
from code_worker.cli.output import plural, print_facts, print_json, print_json_lines, print_table, say
from code_worker.errors import StoreError

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.erasures import Receipt

__all__ = ["erasures", "say_receipt"]


@click.group()
def erasures() -> None:
    """Show receipts of erasures."""


@erasures.command("list")
@click.option("--after", type=ID, help="Continue after this id of the page before.")
@limit_option(20)
@json_option
def list_(*, after: str | None, limit: int, as_json: bool) -> None:
    """List receipts, newest first."""
    from code_worker.store import erasures as table

    with open_ledger() as store:
        found = store.run(lambda session: table.list_receipts(session, after=after, limit=limit), write=False)
    if as_json:
        print_json_lines(_record(one) for one in found)
        return
    rows = [{**asdict(one), "jobs": one.counts.get("jobs"), "images": one.counts.get("images")} for one in found]
    print_table(
        rows, ("id", "created_at", "state", "scope", "by", "jobs", "images", "why"), empty="nothing was erased"
    )


@erasures.command()
@click.argument("erasure", type=ID)
@json_option
def show(erasure: str, *, as_json: bool) -> None:
    """Show one receipt: what was erased, and which releases had learned from it."""
    from code_worker.store import erasures as table

    settings = quiet_settings()
    with open_ledger(settings) as store:
        found = store.run(lambda session: table.get(session, erasure), write=False)
    if found is None:
        raise StoreError(f"no receipt {erasure}: see `code-worker erasures list`")
    say_receipt(settings, found, as_json=as_json)


@erasures.command()
@click.option("--job", type=ID, help="A job's id.")
@click.option("--sha256", type=SHA256, help="An image's content hash.")
@click.option("--tenant", help="A tenant's name.")
@json_option
def check(*, job: str | None, sha256: str | None, tenant: str | None, as_json: bool) -> None:
    """Say whether a job, an image or a tenant was erased; exit status 1 when it was not.

    Receipts hold salted digests, so only who knows what to ask for can ask.
    """
    from code_worker.store import erasures as table

    asked = {table.JOB: job, table.IMAGE: sha256, table.TENANT: tenant}
    named = [(kind, value) for kind, value in asked.items() if value is not None]
    if len(named) != 1:
        raise click.UsageError("say one of --job, --sha256 and --tenant")
    ((kind, value),) = named
    with open_ledger() as store:
        found = store.run(lambda session: table.was_erased(session, kind, value), write=False)
    if as_json:
        print_json_lines(_record(one) for one in found)
    else:
        rows = [asdict(one) for one in found]
        print_table(rows, ("id", "created_at", "state", "scope", "by", "why"), empty="no receipt says so")
    if not found:
        click.get_current_context().exit(1)


def _record(receipt: Receipt) -> dict[str, Any]:
    """A receipt as plain values."""
    return asdict(receipt)


def say_receipt(settings: Settings, receipt: Receipt, *, as_json: bool) -> None:
    """A receipt in a few lines, or as one JSON object; copies that may still hold what was erased on stderr."""
    from code_worker.store import copies

    if as_json:
        print_json(_record(receipt))
    else:
        _say_facts(receipt)
    for copy in copies.may_hold(settings.resolved_database_url, receipt.id):
        say(f"{copy} was left by `db restore` and may still hold what was erased: delete it", err=True)


def _say_facts(receipt: Receipt) -> None:
    state = "erased" if receipt.state == "done" else "not finished: code-worker erase --resume"
    say(f"{receipt.id}: {state}")
    print_facts(
        {
            "scope": receipt.scope,
            "by": receipt.by,
            "why": receipt.why or None,
            "begun": receipt.created_at,
            "finished": receipt.finished_at,
            "erasing now": receipt.step if receipt.state != "done" else None,
            **{name.replace("_", " "): count for name, count in receipt.counts.items()},
            "last look": _last_look(receipt),
        }
    )
    rows = [
        {"release": name, **facts} for name, facts in sorted(receipt.releases.items()) if facts.get("how") != "any"
    ]
    if rows:
        print_table(rows, ("release", "how", "files"), empty="")
    if any(row["files"] == "waiting" for row in rows):
        say(
            "A release in use learned from it, and its heads may hold embeddings: code-worker refit. Its files are "
            "deleted once another is in use."
        )


def _last_look(receipt: Receipt) -> str | None:
    """What the look over all tables and the storage found before the receipt was closed."""
    if (look := receipt.last_look) is None:
        return None
    late = f" ({look['late']} came late, and were erased)" if look.get("late") else ""
    if look.get("scope_unknown"):
        return "an older version began this and did not keep its scope: erase the same again"
    left = sum(count for name, count in look.items() if name != "late")
    return f"{plural(left, 'row or copy', 'rows and copies')} left{late}"
