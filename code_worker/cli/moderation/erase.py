"""`code-worker erase` and `erasures`: forget jobs and images, receipts, and whether something was erased."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.common.arguments import AGO_OR_DATE, ID, SHA256, json_option, limit_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import plural, print_facts, print_json, print_json_lines, print_table, say, who
from code_worker.cli.common.progress import progress
from code_worker.errors import StoreError

if TYPE_CHECKING:
    from code_worker.data.erasure.erase import Eraser, Preview
    from code_worker.settings import Settings
    from code_worker.store.erasure.receipts import Receipt
    from code_worker.store.erasure.scopes import Scope


@click.group()
def erasures() -> None:
    """Show receipts of erasures."""


@erasures.command("list")
@click.option("--after", type=ID, help="Continue after this id of the page before.")
@limit_option(20)
@json_option
def list_(*, after: str | None, limit: int, as_json: bool) -> None:
    """List receipts, newest first."""
    from code_worker.store.erasure import receipts as table

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
    from code_worker.store.erasure import receipts as table

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
    from code_worker.store.erasure import receipts as table

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
    from code_worker.store import backup

    if as_json:
        print_json(_record(receipt))
    else:
        _say_facts(receipt)
    for copy in backup.may_hold(settings.resolved_database_url, receipt.id):
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
    """Returns what the look over all tables and the storage found before the receipt was closed."""
    if (look := receipt.last_look) is None:
        return None
    late = f" ({look['late']} came late, and were erased)" if look.get("late") else ""
    if look.get("scope_unknown"):
        return "an older version began this and did not keep its scope: erase the same again"
    left = sum(count for name, count in look.items() if name != "late")
    return f"{plural(left, 'row or copy', 'rows and copies')} left{late}"


@click.command()
@click.option("--job", type=ID, help="This job; its image too, unless another job judged the same bytes.")
@click.option("--sha256", type=SHA256, help="The image of this content hash, and every job that judged it.")
@click.option("--tenant", help="Every job of this tenant, and their images, unless other jobs judged the same bytes.")
@click.option(
    "--before", type=AGO_OR_DATE, help="All that was accepted or labelled before then, and not spoken of since."
)
@click.option("--why", default="", help="The reason, for the receipt.")
@click.option("--keep-releases", is_flag=True, help="Leave the files of releases that learned from it.")
@click.option("--resume", is_flag=True, help="Only finish what earlier erasures left, if anything.")
@click.option("--dry-run", is_flag=True, help="Print what would be erased; erase nothing.")
@click.option("--yes", is_flag=True, help="Do not ask; needed where nobody can be asked.")
@json_option
def erase(
    *,
    job: str | None,
    sha256: str | None,
    tenant: str | None,
    before: datetime | None,
    why: str,
    keep_releases: bool,
    resume: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Erase all that is kept of jobs and images; what a receipt says of it tells nobody what it was.

    Rows, embeddings, labels, kept copies, caches and directories of runs go; releases whose heads may hold embeddings
    lose their files once no alias points to them; the database's files are rewritten. Begun again after a crash it
    goes on where it ended. What was erased before and of which nothing is kept is not erased again: its receipt is
    shown.

    Exit status: 0 erased; 1 something could not be erased now, or nothing is kept of the job, image or tenant nor was
    anything erased of it (while a job is being judged, an unknown --sha256 may be of its image, and is not refused);
    2 when there is no terminal to ask at and no `--yes`.
    """
    from code_worker.data.erasure.erase import Eraser
    from code_worker.store.erasure.scopes import Scope

    if tenant == "":
        raise click.UsageError("an empty name stands for no tenant: say whose images are to go")
    scope = Scope(job, sha256, tenant, before)
    if sum(value is not None for value in (job, sha256, tenant, before)) != int(not resume):
        raise click.UsageError("say one of --job, --sha256, --tenant and --before, or --resume alone")
    asks = not yes and not resume and not dry_run
    if asks and not sys.stdin.isatty():
        raise click.UsageError("this cannot be undone and there is no terminal to ask at: say --yes, or --dry-run")
    settings = quiet_settings()
    with open_ledger(settings) as store:
        eraser = Eraser(settings, store)
        if resume:
            left = eraser.resume()
            say(f"{plural(left, 'erasure was', 'erasures were')} left, and {'is' if left == 1 else 'are'} finished")
        elif dry_run:
            _say_preview(eraser.preview(scope), as_json=as_json)
        else:
            _erase(settings, eraser, scope, why, keep_releases=keep_releases, ask=asks, as_json=as_json)


def _erase(
    settings: Settings, eraser: Eraser, scope: Scope, why: str, *, keep_releases: bool, ask: bool, as_json: bool
) -> None:
    if (before := eraser.erased_before(scope)) is not None:
        say("it was erased before, and nothing is kept of it; this is the receipt of then:", err=True)
        say_receipt(settings, before, as_json=as_json)
        return
    if ask:
        _say_preview(eraser.preview(scope), as_json=False)
        click.confirm("This cannot be undone. Erase it?", abort=True)
    with progress("erasing", counted=True) as advance:
        receipt = eraser.erase(scope, by=who(), why=why, keep_releases=keep_releases, say=advance)
    say_receipt(settings, receipt, as_json=as_json)


def _say_preview(preview: Preview, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(preview))
        return
    facts: dict[str, Any] = {
        "jobs": preview.jobs,
        "images": preview.images,
        "labels": preview.labels,
        "kept copies": preview.copies,
        "images that other jobs share": f"{preview.shared}, which stay" if preview.shared else None,
        "releases that learned from it": ", ".join(f"{name} ({how})" for name, how in preview.releases.items())
        or None,
    }
    print_facts(facts)
