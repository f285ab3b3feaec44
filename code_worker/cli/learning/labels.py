"""`code-worker label` and `labels`: say, import, list and export labels, and where labellers contradict."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from code_worker.cli.common.arguments import AGO_OR_DATE, ID, json_option, limit_option, raw_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import output_stream, plural, print_json, print_json_lines, print_table, say, who
from code_worker.cli.common.progress import progress
from code_worker.cli.common.records import write_csv, write_json_lines

if TYPE_CHECKING:
    from code_worker.data.label_files.label_import import Imported
    from code_worker.settings import LabelSettings
    from code_worker.store.engine import Store
    from code_worker.store.learning.labels import Conflict


@click.command()
@click.argument("target", metavar="URI|JOB|HASH")
@click.argument("label_", metavar="real|fake", type=click.Choice(["real", "fake"]))
@click.option("--generator", help="What made a fake one, if you know.")
@click.option("--collection", help="Where the image came from: a data set, a channel.")
@click.option("--group", help="Record or post that the image belongs to: its images stay in one part of the labels.")
@click.option("--by", help="Who says so; unset: you.")
@click.option("--note", default="", help="Free text.")
@json_option
def label(
    *,
    target: str,
    label_: str,
    generator: str | None,
    collection: str | None,
    group: str | None,
    by: str | None,
    note: str,
    as_json: bool,
) -> None:
    """Say that an image is real or fake, and keep a copy of it.

    The image is named by a URI or path that the settings allow, by the job that judged it, or by the content hash of
    a copy that is kept. Saying the same again adds nothing; saying something else is another statement.

    Exit status: 0 it is said; 1 the image could not be read, or is no image; 2 wrong use or configuration.
    """
    if not target.strip():
        raise click.UsageError("an empty address names no image: is a variable of a script unset?")
    from code_worker.data.labelling import Labeller

    settings = quiet_settings()
    with open_ledger(settings) as store, closing(Labeller(settings, store)) as labeller:
        try:
            done = labeller.label(
                target,
                label_,
                by=who() if by is None else by,
                generator=generator,
                collection=collection,
                group=group,
                note=note,
                source="cli",
                actor=who(),
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    if as_json:
        print_json({**asdict(done), "label": label_})
    else:
        say(f"{'labelled' if done.new else 'said before:'} {label_}: {done.uri} ({done.sha256})")


F = TypeVar("F", bound=Callable[..., Any])
_STATEMENT = (
    *("at", "label", "generator", "by", "uri", "sha256"),
    *("collection", "group", "source", "note", "job_id", "id", "created_at"),
)
_RESOLVED = (
    *("sha256", "uri", "label", "generator", "collection"),
    *("labellers", "contradicted", "last_at", "first_created_at"),
)
_FILTERS = (
    click.option("--label", type=click.Choice(["real", "fake"])),
    click.option("--generator", help="What is said to have made the image."),
    click.option("--collection", help="Where the image is said to come from."),
    click.option("--by", help="Who says so."),
    click.option("--sha256", help="Of the image's bytes."),
    click.option("--since", type=AGO_OR_DATE, help="Written here from then on: 2026-01-31, 7d or 12h; UTC."),
    click.option("--until", type=AGO_OR_DATE, help="Written before then: 2026-01-31, 7d or 12h; UTC."),
)


def _filters(command: F) -> F:
    for option in reversed(_FILTERS):
        command = option(command)
    return command


@click.group()
def labels() -> None:
    """Import, list and export labels, and show where labellers contradict each other."""


@labels.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "jsonl", "label-studio", "ground-truth"]),
    help="What the file is; unset: told by its content.",
)
@click.option(
    "--map",
    "mapping",
    multiple=True,
    metavar="WORD=LABEL[:GENERATOR]",
    help="What a word in the file means: ai=fake, 0=real, flux=fake:flux. May be repeated.",
)
@click.option("--by", help="Who labelled, where the file does not say; unset: you.")
@click.option("--collection", help="Where the images came from, where the file does not say.")
@click.option("--base", metavar="DIR|s3://…", help="Where relative paths begin; unset: the file's directory.")
@click.option("--json", "as_json", is_flag=True, help="The counts as one JSON object.")
def import_(
    *,
    file: Path,
    form: str | None,
    mapping: Sequence[str],
    by: str | None,
    collection: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """Take over the labels of a file: CSV, JSON lines, a Label Studio export, a Ground Truth manifest.

    Every image is fetched and a copy of it kept. A bad row is named on stderr and does not stop the others; a row
    that was imported before changes nothing.

    Exit status: 0 all rows taken over; 1 some were bad, or the file as a whole; 2 wrong use or configuration.
    """
    from code_worker.data.label_files.label_import import import_rows, read_rows
    from code_worker.data.label_files.label_rows import Words
    from code_worker.data.labelling import Labeller

    settings = quiet_settings()
    rows = read_rows(file, Words(mapping), form=form, base=base)
    with open_ledger(settings) as store, closing(Labeller(settings, store)) as labeller:
        done = import_rows(
            labeller,
            rows,
            name=file.name,
            by=by or who(),
            collection=collection,
            threads=settings.worker.fetch_threads,
            actor=who(),
            sha256=_sha256(file),
        )
        counts = _reported(done)
    if as_json:
        print_json(counts)
    else:
        new, refused = plural(counts["new"], "new label"), plural(counts["refused"], "row")
        skipped = f"; skipped: {counts['skipped']:,} without annotation" if counts["skipped"] else ""
        click.echo(f"{new}, {counts['known']:,} said before, {refused} refused{skipped}")
    raise SystemExit(1 if counts["refused"] else 0)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _reported(done: Iterator[Imported]) -> dict[str, int]:
    counts = {"new": 0, "known": 0, "refused": 0, "skipped": 0}
    with progress("importing labels", counted=True) as advance:
        for some in done:
            for place, reason in some.refused:
                say(f"{place}: {reason}", err=True)
            counts["new"] += some.new
            counts["known"] += some.rows - some.new - len(some.refused) - some.unsaid
            counts["skipped"] += some.unsaid
            counts["refused"] += len(some.refused)
            advance(some.rows)
    return counts


@labels.command("list")
@_filters
@limit_option(50)
@click.option("--after", type=ID, metavar="LABEL_ID", help="Continue after this label: the next page.")
@click.option("--oldest-first", is_flag=True, help="In the order of writing; newest first unless said.")
@json_option
def list_(*, limit: int, after: str | None, oldest_first: bool, as_json: bool, **filters: Any) -> None:
    """List what was said of images, newest first, one page at a time."""
    from code_worker.store.learning.labels import LabelFilter, list_labels

    with open_ledger() as store:
        found = store.run(
            lambda session: list_labels(
                session, LabelFilter(**filters), after=after, limit=limit + 1, newest_first=not oldest_first
            ),
            write=False,
        )
    page = found[:limit]
    if as_json:
        print_json_lines(map(asdict, page))
    else:
        empty = "no labels match" if any(filters.values()) else "no labels yet"
        print_table(map(asdict, page), ("at", "label", "generator", "by", "uri", "sha256"), empty=empty)
    if len(found) > limit:
        click.echo(f"more: --after {page[-1].id}", err=True)


@labels.command()
@click.option("--statements", is_flag=True, help="All that was said, instead of one label per image.")
@click.option("--csv", "form", flag_value="csv", help="Comma-separated, with a header.")
@click.option("--jsonl", "form", flag_value="jsonl", default=True, help="One JSON object per line (default).")
@raw_option
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File; it appears once it is whole.")
@click.option("--since", type=AGO_OR_DATE, help="Only images spoken of since: 2026-01-31, 7d or 12h; UTC.")
def export(*, statements: bool, form: str, raw: bool, output: Path | None, since: datetime | None) -> None:
    """Write one label per image, as the rule of the settings resolves them, or every statement.

    Images that the rule leaves undecided are left out. What is written can be imported again.
    """
    settings = quiet_settings()
    bar = progress("exporting labels", counted=True, beside_rows=output is None)
    with open_ledger(settings) as store, output_stream(output) as file, bar as advance:
        found = _statements(store, since) if statements else _resolved(store, settings.labels, since)
        written = 0

        def records() -> Iterator[dict[str, Any]]:
            nonlocal written
            for record in found:
                written += 1
                advance(1)
                yield record

        if form == "csv":
            write_csv(records(), _STATEMENT if statements else _RESOLVED, file, raw=raw)
        else:
            write_json_lines(records(), file)
    say(f"{plural(written, 'label')} written{f' to {output}' if output else ''}", err=True)


def _statements(store: Store, since: datetime | None) -> Iterator[dict[str, Any]]:
    from code_worker.store.learning.labels import LabelFilter, stream

    for statement in stream(store, LabelFilter(since=since)):
        yield {name: getattr(statement, name) for name in _STATEMENT}


def _resolved(store: Store, rules: LabelSettings, since: datetime | None) -> Iterator[dict[str, Any]]:
    from code_worker.store.learning.kept_images import kept
    from code_worker.store.learning.labels import resolve
    from code_worker.wire import chunks

    found = store.run(
        lambda session: resolve(session, rule=rules.rule, trusted=rules.trusted, ignored=rules.ignored, since=since),
        write=False,
    )
    for some in chunks(found, 1000):
        copies = store.run(lambda session, some=some: kept(session, [one.sha256 for one in some]), write=False)  # type: ignore[misc]
        for label in some:
            copy = copies.get(label.sha256)
            yield {"sha256": label.sha256, "uri": copy and copy.uri, **asdict(label)}


@labels.command()
@click.option("--after", metavar="SHA256", help="Continue after this image: the next page.")
@limit_option(50)
@json_option
def conflicts(*, after: str | None, limit: int, as_json: bool) -> None:
    """List images of which labellers say different things now: what the rule makes of it, and all that they said.

    What is said by those whom CODE_WORKER_LABELS__IGNORED names is no part of it.
    """
    from code_worker.store.learning.labels import conflicts as disputed

    settings = quiet_settings()
    with open_ledger(settings) as store:
        found = store.run(
            lambda session: disputed(session, ignored=settings.labels.ignored, after=after, limit=limit + 1),
            write=False,
        )
    page = found[:limit]
    rows = [row for conflict in page for row in _conflict_rows(conflict, settings.labels)]
    if as_json:
        print_json_lines(_conflict_record(conflict, settings.labels) for conflict in page)
    else:
        print_table(rows, ("sha256", "label", "generator", "by", "at", "uri"), empty="no conflicts")
    if len(found) > limit:
        click.echo(f"more: --after {page[-1].sha256}", err=True)


@labels.command()
@click.argument("target", metavar="URI|JOB|HASH")
@click.argument("label", metavar="real|fake", type=click.Choice(["real", "fake"]))
@click.option("--generator", help="What made a fake one, if you know.")
@click.option("--note", default="", help="Why.")
def settle(target: str, label: str, generator: str | None, note: str) -> None:
    """Say, as a reviewer, what an image is; that holds against labellers and the rule.

    Nobody's statement is removed, and a later review settles it anew. Exit status: as `code-worker label`.
    """
    from code_worker.data.labelling import Labeller
    from code_worker.store.learning.label_rules import REVIEW

    settings = quiet_settings()
    with open_ledger(settings) as store, closing(Labeller(settings, store)) as labeller:
        try:
            done = labeller.label(target, label, by=who(), generator=generator, note=note, source=REVIEW)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    say(f"{'settled' if done.new else 'settled before:'} {label}: {done.uri} ({done.sha256})")


def _conflict_record(conflict: Conflict, rules: LabelSettings) -> dict[str, Any]:
    resolved = conflict.resolved(rules.rule, rules.trusted)
    return {
        "sha256": conflict.sha256,
        "resolved": resolved and resolved.label,
        "statements": [{**asdict(said), "at": said.at.isoformat()} for said in conflict.statements],
    }


def _conflict_rows(conflict: Conflict, rules: LabelSettings) -> Iterator[dict[str, Any]]:
    resolved = conflict.resolved(rules.rule, rules.trusted)
    yield {"sha256": conflict.sha256, "label": resolved.label if resolved else "undecided", "by": f"({rules.rule})"}
    for said in conflict.statements:
        yield {**asdict(said), "sha256": ""}
