"""`code-worker scan`: judge images now, in this process, with no broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from code_worker.cli.arguments import json_option, raw_option
from code_worker.cli.ledger import quiet_settings
from code_worker.cli.output import say
from code_worker.cli.progress import progress
from code_worker.cli.scan_inputs import Inputs, say_left_out
from code_worker.cli.scan_report import Form, Tally, printer
from code_worker.cli.scan_runtime import start

if TYPE_CHECKING:
    from code_worker.moderation.scan import ScanOptions
    from code_worker.settings import Settings
    from code_worker.types import Verdict

__all__ = ["scan"]


@click.command()
@click.argument("paths", metavar="PATH|URI…", nargs=-1, required=True)
@click.option("--release", metavar="ID|DIR", help="Release to judge with: an id, or a release directory.")
@click.option("--head", help="Head to judge with; unset: what plugins, policy and settings say.")
@click.option("--tenant", help="Whose images; chooses the policy.")
@click.option("--content-type", help="Kind of content; chooses the policy.")
@click.option("--all-files", is_flag=True, help="Judge every file of a directory, not only images.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated, with a header.")
@raw_option
def scan(
    *,
    paths: Sequence[str],
    release: str | None,
    head: str | None,
    tenant: str | None,
    content_type: str | None,
    all_files: bool,
    as_json: bool,
    as_csv: bool,
    raw: bool,
) -> None:
    """Judge images now, in this process: files, directories, s3://bucket/key and s3://bucket/prefix/.

    Judges with the champion of the database, or with the release named. Nothing is written to the database.
    Buckets must be allowed by CODE_WORKER_S3__BUCKETS; what is named here of this machine's files may be read.

    An image of a directory or prefix is what has the suffix of one, and what begins as one whatever it is called. The
    rest is passed over and listed on stderr.

    Exit status: 0 all judged; 1 some images were rejected, or a directory could not be listed; 2 wrong use or
    configuration, or the release cannot be loaded here: it is damaged or not signed, or the plugin of a head is
    missing, fails or has changed.
    """
    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both")
    from code_worker.moderation.scan import ScanOptions

    inputs = Inputs(paths, every_file=all_files)
    settings = inputs.allow(quiet_settings())
    options = ScanOptions(head=head, tenant=tenant, content_type=content_type)
    tally = Tally()
    form = Form.JSON if as_json else Form.CSV if as_csv else Form.TABLE
    show: Callable[[Verdict], None] | None = None
    with progress("judging", counted=True, beside_rows=True) as advance:
        for verdict in _verdicts(settings, inputs, release, options, tally.begin):
            show = show or printer(form, raw=raw)
            show(verdict)
            tally.add(verdict)
            advance(1)
    say_left_out(inputs.left_out, but=" (--all-files judges them)")
    say(tally.summary(), err=True)
    raise SystemExit(1 if tally.rejected or inputs.left_out.unreadable else 0)


def _verdicts(
    settings: Settings, inputs: Inputs, release: str | None, options: ScanOptions, on_ready: Callable[[], None]
) -> Iterator[Verdict]:
    from code_worker.moderation.scan import scan as judge_all

    with start(settings, release) as ready:
        on_ready()
        yield from judge_all(inputs.uris(ready.sources), ready.judge, ready.runtime, ready.policies, options)
