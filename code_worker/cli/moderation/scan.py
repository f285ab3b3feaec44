"""`code-worker scan`: judge images now, in this process, with no broker."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from code_worker.cli.common.arguments import json_option, raw_option
from code_worker.cli.common.database import quiet_settings
from code_worker.cli.common.image_inputs import Inputs, say_left_out
from code_worker.cli.common.output import console, plural, print_json, say
from code_worker.cli.common.progress import progress
from code_worker.cli.common.records import SCAN_FIELDS, judgement, verdict_record, write_csv_row
from code_worker.cli.common.release_runtime import start
from code_worker.data.label_files.tables import csv_line
from code_worker.system.terminal import printable
from code_worker.types import Label, Outcome

if TYPE_CHECKING:
    from rich.console import Console

    from code_worker.moderation.scan import ScanOptions
    from code_worker.settings import Settings
    from code_worker.types import Verdict

_STYLES = {Label.REAL: "green", Label.FAKE: "red", Label.UNCERTAIN: "yellow"}
_VERDICT_WIDTH = 18


class Form(Enum):
    """Forms in which rows are printed."""

    TABLE = auto()
    JSON = auto()
    CSV = auto()


class Tally:
    """Counts what a scan found."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._by_label: Counter[str] = Counter()
        self.rejected = 0

    def begin(self) -> None:
        """The release is loaded: from now on it is judging that takes the time."""
        self._began = time.perf_counter()

    def add(self, verdict: Verdict) -> None:
        """Counts one verdict."""
        if verdict.outcome is Outcome.REJECTED:
            self.rejected += 1
        else:
            self._by_label[str(verdict.label)] += 1

    def summary(self) -> str:
        """One line: how many of what, and how fast."""
        total = self._by_label.total() + self.rejected
        seconds = time.perf_counter() - (self._began or 0.0)
        found = [f"{count} {label}" for label, count in sorted(self._by_label.items())]
        found += [f"{self.rejected} rejected"] if self.rejected else []
        parts = [plural(total, "image"), ", ".join(found)] if total else ["no image found"]
        parts += [f"{total / seconds:.1f} images/s"] if total else []
        return " · ".join(parts)


def printer(form: Form, *, raw: bool = False) -> Callable[[Verdict], None]:
    """Returns what prints one verdict; a header, where there is one, is printed now."""
    if form is Form.JSON:
        return lambda verdict: print_json(_record(verdict))
    if form is Form.CSV:
        sys.stdout.write(csv_line(SCAN_FIELDS))
        return partial(_write_row, raw=raw)
    out = console()
    out.print(_line("verdict", "score", "head", "image"), style="bold")
    return lambda verdict: _print_row(out, verdict)


def _record(verdict: Verdict) -> dict[str, Any]:
    whole = verdict_record(verdict)
    return {name: whole[name] for name in SCAN_FIELDS}


def _write_row(verdict: Verdict, *, raw: bool) -> None:
    write_csv_row(_record(verdict), SCAN_FIELDS, sys.stdout, raw=raw)


def _print_row(out: Console, verdict: Verdict) -> None:
    score = "" if verdict.score is None else f"{verdict.score:.3f}"
    row = Text(printable(_line(judgement(verdict), score, verdict.head or "", verdict.uri)))
    row.stylize(_STYLES.get(verdict.label, "magenta") if verdict.label else "magenta", 0, _VERDICT_WIDTH)
    if verdict.detail:
        row.append(printable(f"  {verdict.detail}"), style="dim")
    out.print(row, soft_wrap=True)


def _line(verdict: str, score: str, head: str, image: str) -> str:
    return f"{verdict:<{_VERDICT_WIDTH}}  {score:>5}  {head:<8}  {image}"


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

    An image of a directory or prefix is what has the suffix of one, and what begins as one under any name. The
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
