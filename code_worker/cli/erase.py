"""`code-worker erase`: forget jobs and images, and leave a receipt."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.arguments import AGO_OR_DATE, ID, SHA256, json_option
from code_worker.cli.erasures import say_receipt
from code_worker.cli.ledger import open_ledger, quiet_settings
from code_worker.cli.output import plural, print_facts, print_json, say
from code_worker.cli.progress import progress
from code_worker.cli.who import who

if TYPE_CHECKING:
    from code_worker.data.erasure import Eraser, Preview, Scope
    from code_worker.settings import Settings

__all__ = ["erase"]


@click.command()
@click.option("--job", type=ID, help="This job; its image too, unless another job judged the same bytes.")
@click.option("--sha256", type=SHA256, help="The image of this content hash, and every job that judged it.")
@click.option("--tenant", help="Every job of this tenant, and their images as above.")
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
    from code_worker.data.erasure import Eraser, Scope

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
