"""`code-worker verdicts`: list, explain, time and export what was decided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from code_worker.cli.common.arguments import AGO_OR_DATE, ID, SHA256, SHARE, json_option, limit_option, raw_option
from code_worker.cli.common.database import open_ledger
from code_worker.cli.common.output import (
    output_stream,
    plural,
    print_facts,
    print_json,
    print_json_lines,
    print_table,
    say,
)
from code_worker.cli.common.progress import progress
from code_worker.cli.common.records import (
    VERDICT_FIELDS,
    explain,
    judgement,
    verdict_record,
    write_csv,
    write_json_lines,
)
from code_worker.errors import StoreError
from code_worker.types import Label, Outcome, RejectReason

if TYPE_CHECKING:
    from code_worker.store.verdicts import VerdictFilter
    from code_worker.types import Verdict

COLUMNS = ("stage", "images", "median_ms", "p95_ms", "p99_ms", "longest_ms")
_REUSED = "reused"


def stage_timings(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """One row per stage, in the order in which an image goes through them; percentiles by nearest rank.

    An image whose embedding was known went through fewer stages; `reused` counts those.
    """
    taken: dict[str, list[float]] = {}
    for verdict in verdicts:
        for stage, value in verdict.timings_ms.items():
            taken.setdefault(stage, []).append(float(value))
    reused = taken.pop(_REUSED, [])
    rows = [_timing_row(stage, sorted(values)) for stage, values in taken.items()]
    return [*rows, {"stage": _REUSED, "images": len(reused)}] if reused else rows


def _timing_row(stage: str, values: list[float]) -> dict[str, Any]:
    def rank(share: float) -> float:
        return round(values[max(0, -(-int(share * 100) * len(values) // 100) - 1)], 3)

    return {
        "stage": stage,
        "images": len(values),
        "median_ms": rank(0.50),
        "p95_ms": rank(0.95),
        "p99_ms": rank(0.99),
        "longest_ms": round(values[-1], 3),
    }


F = TypeVar("F", bound=Callable[..., Any])
_FILTERS = (
    click.option("--outcome", type=click.Choice([str(one) for one in Outcome]), help="Judged or rejected ones."),
    click.option("--label", type=click.Choice([str(one) for one in Label]), help="Of judged images."),
    click.option("--reason", type=click.Choice([str(one) for one in RejectReason]), help="Of rejected images."),
    click.option("--tenant", help="Whose images."),
    click.option("--content-type", help="Kind of content."),
    click.option("--release", help="Release that judged."),
    click.option("--head", help="Head that scored."),
    click.option("--sha256", type=SHA256, help="Of the image's bytes."),
    click.option("--uri-prefix", help="Beginning of the URI."),
    click.option("--since", type=AGO_OR_DATE, help="From then on: 2026-01-31, 7d or 12h; UTC."),
    click.option("--until", type=AGO_OR_DATE, help="Before then: 2026-01-31, 7d or 12h; UTC."),
    click.option("--score-min", type=SHARE, help="Least score."),
    click.option("--score-max", type=SHARE, help="Greatest score."),
    click.option("--superseded", is_flag=True, help="Also verdicts that a retry or a rescore has replaced."),
)


def _filters(command: F) -> F:
    for option in reversed(_FILTERS):
        command = option(command)
    return command


def _wanted(filters: dict[str, Any]) -> VerdictFilter:
    from code_worker.store.verdicts import VerdictFilter

    values = {**filters, "live_only": not filters["superseded"]}
    del values["superseded"]
    for name, kind in (("outcome", Outcome), ("label", Label), ("reason", RejectReason)):
        values[name] = values[name] and kind(values[name])
    return VerdictFilter(**values)


@click.group()
def verdicts() -> None:
    """List, explain and export verdicts."""


@verdicts.command("list")
@_filters
@limit_option(50)
@click.option("--after", type=ID, metavar="VERDICT_ID", help="Continue after this verdict: the next page.")
@click.option("--oldest-first", is_flag=True, help="In the order of time; newest first unless said.")
@json_option
def list_(*, limit: int, after: str | None, oldest_first: bool, as_json: bool, **filters: Any) -> None:
    """List verdicts, newest first, one page at a time.

    A page stays what it was while new verdicts arrive: the next one begins after the last id of this one.
    """
    from code_worker.store.verdicts import list_verdicts

    wanted = _wanted(filters)
    with open_ledger() as store:
        found = store.run(
            lambda session: list_verdicts(
                session, wanted, after=after, limit=limit + 1, newest_first=not oldest_first
            ),
            write=False,
        )
    page = found[:limit]
    if as_json:
        print_json_lines(map(verdict_record, page))
    else:
        columns = ("created_at", "verdict", "score", "head", "uri", "job")
        print_table(
            map(_row, page), columns, empty="no verdicts match" if any(filters.values()) else "no verdicts yet"
        )
    if len(found) > limit:
        say(f"more: --after {page[-1].id}", err=True)


def _row(verdict: Verdict) -> dict[str, Any]:
    return {
        "created_at": verdict.created_at,
        "verdict": judgement(verdict),
        "score": None if verdict.score is None else f"{verdict.score:.3f}",
        "head": verdict.head,
        "uri": verdict.uri,
        "job": verdict.job_id,
    }


@verdicts.command()
@click.argument("id_", metavar="JOB_ID|VERDICT_ID", type=ID)
@json_option
def show(id_: str, *, as_json: bool) -> None:
    """Explain one verdict: what was judged, by what, and why.

    Given a job's id, its live verdict. Exit status 1: there is none (yet).
    """
    from code_worker.store import jobs
    from code_worker.store.verdicts import get, live

    with open_ledger() as store:
        verdict, job = store.run(
            lambda session: (live(session, id_) or get(session, id_), jobs.get(session, id_)), write=False
        )
    if verdict is None:
        raise StoreError(
            f"job {id_} has no verdict yet; it is {job.state}" if job else f"no job and no verdict has the id {id_}"
        )
    if as_json:
        print_json(verdict_record(verdict))
    else:
        sentence, facts = explain(verdict)
        say(sentence, "")
        print_facts(facts)


@verdicts.command()
@_filters
@limit_option(10_000)
@json_option
def timings(*, limit: int, as_json: bool, **filters: Any) -> None:
    """Say how long each stage took: median, 95th and 99th percentile over the newest verdicts that match."""
    from code_worker.store.verdicts import list_verdicts

    wanted = _wanted(filters)
    with open_ledger() as store:
        rows = stage_timings(store.run(lambda session: list_verdicts(session, wanted, limit=limit), write=False))
    if as_json:
        print_json_lines(rows)
    else:
        print_table(rows, COLUMNS, empty="no verdict that matches went through any stage")


@verdicts.command()
@click.option("--csv", "form", flag_value="csv", help="Comma-separated, with a header.")
@click.option("--jsonl", "form", flag_value="jsonl", default=True, help="One JSON object per line (default).")
@raw_option
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File; it appears once it is whole.")
@_filters
def export(*, form: str, raw: bool, output: Path | None, **filters: Any) -> None:
    """Write every verdict that matches, oldest first, however many there are."""
    from code_worker.store.verdicts import stream

    wanted = _wanted(filters)
    bar = progress("exporting verdicts", counted=True, beside_rows=output is None)
    with open_ledger() as store, output_stream(output) as file, bar as advance:
        written = 0

        def records() -> Iterator[dict[str, Any]]:
            nonlocal written
            for verdict in stream(store, wanted):
                written += 1
                advance(1)
                yield verdict_record(verdict)

        if form == "csv":
            write_csv(records(), VERDICT_FIELDS, file, raw=raw)
        else:
            write_json_lines(records(), file)
    say(f"{plural(written, 'verdict')} written{f' to {output}' if output else ''}", err=True)
