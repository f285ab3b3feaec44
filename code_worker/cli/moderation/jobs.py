"""`code-worker jobs`: what is waiting, what went wrong, and trying again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from code_worker.cli.common.arguments import ID, json_option, limit_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import plural, print_facts, print_json, print_json_lines, print_table, say, to_json
from code_worker.cli.common.progress import progress
from code_worker.cli.common.records import job_record, judgement, verdict_record
from code_worker.errors import StoreError
from code_worker.types import JobState, RejectReason
from code_worker.wire import QUEUES, chunks

if TYPE_CHECKING:
    from code_worker.store.engine import Store
    from code_worker.store.jobs import JobInfo

_STATES = click.Choice([str(state) for state in JobState])
_REASONS = click.Choice([str(reason) for reason in RejectReason])
_PER_TRANSACTION = 500
_SHOWN_OF_MESSAGE = 120


@click.group()
def jobs() -> None:
    """List, show and retry jobs."""


@jobs.command("list")
@click.option("--state", type=_STATES, help="Where the jobs stand; done covers judged and rejected.")
@click.option("--tenant", help="Whose images.")
@click.option("--queue", type=click.Choice([name.removeprefix("code_worker.") for name in QUEUES]), help="Urgency.")
@limit_option(50)
@click.option("--after", type=ID, metavar="JOB_ID", help="Continue after this job: the next page.")
@json_option
def list_(
    *, state: str | None, tenant: str | None, queue: str | None, limit: int, after: str | None, as_json: bool
) -> None:
    """List jobs, newest first, one page at a time."""
    from code_worker.store.jobs import JobFilter, list_jobs

    wanted = JobFilter(JobState(state) if state else None, tenant, queue and f"code_worker.{queue}")
    with open_ledger() as store:
        found = store.run(lambda session: list_jobs(session, wanted, after=after, limit=limit + 1), write=False)
    page = found[:limit]
    if as_json:
        print_json_lines(map(job_record, page))
    else:
        columns = ("created_at", "id", "state", "queue", "attempts", "faults", "uri")
        print_table(map(_row, page), columns, empty="no jobs match" if wanted != JobFilter() else "no jobs yet")
    if len(found) > limit:
        say(f"more: --after {page[-1].id}", err=True)


def _row(job: JobInfo) -> dict[str, Any]:
    return {**job_record(job), "queue": job.queue.removeprefix("code_worker.")}


@jobs.command()
@click.argument("id_", metavar="JOB_ID", type=ID)
@json_option
def show(id_: str, *, as_json: bool) -> None:
    """Show everything the ledger knows of a job, its verdict included."""
    from code_worker.store.jobs import get
    from code_worker.store.verdicts import live

    with open_ledger() as store:
        job, verdict = store.run(lambda session: (get(session, id_), live(session, id_)), write=False)
    if job is None:
        raise StoreError(f"no job has the id {id_}")
    if as_json:
        print_json({**job_record(job), "verdict": verdict and verdict_record(verdict)})
        return
    facts = {name.replace("_", " "): value for name, value in job_record(job).items() if value not in ({}, "")}
    print_facts({**facts, "metadata": to_json(job.metadata) if job.metadata else None})
    if verdict is None:
        say("", "no verdict yet")
    else:
        say("", f"verdict: {judgement(verdict)}   (code-worker verdicts show {id_})")


@jobs.command()
@click.argument("ids", metavar="[JOB_ID]…", nargs=-1, type=ID)
@click.option("--state", type=click.Choice(["quarantined"]), help="All jobs that ended so.")
@click.option("--reason", type=_REASONS, help="All jobs whose image was rejected for this reason.")
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=10_000, show_default=True, help="At most so many."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
def retry(ids: Sequence[str], *, state: str | None, reason: str | None, limit: int, yes: bool) -> None:
    """Judge finished jobs again; each gets a new verdict beside the old one, which stays.

    Jobs that are not finished are left alone.

    Exit status: 0 done; 1 a job that was named is unknown or not finished; 2 wrong use, or no terminal to ask at and
    no `--yes`.
    """
    if sum(map(bool, (ids, state, reason))) != 1:
        raise click.UsageError("name jobs, or --state quarantined, or --reason CODE: exactly one of them")
    settings = quiet_settings()
    with open_ledger(settings) as store:
        wanted = list(ids) or list(_found(store, reason, limit))
        if not wanted:
            say("no job to retry")
            return
        if not ids and not yes:
            _ask(len(wanted))
        left_alone = _left_alone(store, ids)
        again = _retry(store, wanted)
    heard = "; workers hear of it within seconds" if again else ""
    say(f"{again:,} of {plural(len(wanted), 'job')} to be judged again{heard}")
    for problem in left_alone:
        say(problem, err=True)
    if ids and again < len(wanted):
        raise SystemExit(1)


def _ask(count: int) -> None:
    """Returns when somebody says yes.

    Raises:
        click.UsageError: nobody is there to answer.
        click.Abort: they said no.
    """
    try:
        sure = click.confirm(f"retry {plural(count, 'job')}?", err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise click.UsageError(f"nobody answers whether to retry {plural(count, 'job')}: say --yes") from None
    if not sure:
        raise click.Abort


def _left_alone(store: Store, ids: Sequence[str]) -> list[str]:
    """Returns which of the jobs cannot be retried, and why."""
    from code_worker.store.jobs import get

    found = store.run(lambda session: {id_: get(session, id_) for id_ in ids}, write=False)
    return [
        f"no job has the id {id_}" if job is None else f"job {id_} is not finished: it is {job.state}"
        for id_, job in found.items()
        if job is None or job.finished_at is None
    ]


def _found(store: Store, reason: str | None, limit: int) -> Iterator[str]:
    """Ids of jobs rejected for the reason, or of quarantined ones; all are read before one is retried."""
    from code_worker.store.verdicts import VerdictFilter, stream

    if reason is None:
        return islice(_quarantined(store), limit)
    # Among them may be some that wait for their next verdict already; these are left alone.
    return (verdict.job_id for verdict in islice(stream(store, VerdictFilter(reason=RejectReason(reason))), limit))


def _quarantined(store: Store) -> Iterator[str]:
    from code_worker.store.jobs import JobFilter, list_jobs
    from code_worker.store.paging import pages

    def read(last: str | None) -> list[JobInfo]:
        wanted = JobFilter(JobState.QUARANTINED)
        return store.run(lambda session: list_jobs(session, wanted, after=last, limit=_PER_TRANSACTION), write=False)

    return (job.id for page in pages(read, lambda job: job.id, None) for job in page)


def _retry(store: Store, wanted: Sequence[str]) -> int:
    from code_worker.store.jobs import retry as accept_again

    again = 0
    with progress("retrying jobs", len(wanted)) as advance:
        for group in chunks(wanted, _PER_TRANSACTION):
            tries: list[int] = []
            store.run(lambda session, group=group, tries=tries: tries.append(len(accept_again(session, group))))  # type: ignore[misc]
            # A try whose commit's answer was lost retried them, and the next one found none to retry.
            again += max(tries)
            advance(len(group))
    return again


@jobs.command()
@json_option
def counts(*, as_json: bool) -> None:
    """Count jobs by state."""
    from code_worker.store import jobs as ledger

    with open_ledger() as store:
        found, oldest_s = store.run(
            lambda session: (ledger.counts(session), ledger.oldest_unfinished_s(session)), write=False
        )
    record = {str(state): number for state, number in found.items()}
    if as_json:
        print_json({**record, "oldest_unfinished_s": oldest_s})
    else:
        age = None if oldest_s is None else f"{oldest_s:.0f} s ago"
        print_facts({**record, "oldest unfinished": age})


@jobs.command("dead-letters")
@limit_option(50)
@click.option("--after", type=ID, metavar="ID", help="Continue after this message: the next page.")
@json_option
def dead_letters(*, limit: int, after: str | None, as_json: bool) -> None:
    """List broker messages that nobody could read, newest first."""
    from code_worker.store.workers import list_dead_letters

    with open_ledger() as store:
        found = store.run(lambda session: list_dead_letters(session, after=after, limit=limit + 1), write=False)
    page = [asdict(letter) for letter in found[:limit]]
    if as_json:
        print_json_lines(page)
    else:
        rows = [{**letter, "message": letter["body"][:_SHOWN_OF_MESSAGE]} for letter in page]
        print_table(rows, ("at", "id", "error", "message"), empty="no dead letters: every message could be read")
    if len(found) > limit:
        say(f"more: --after {found[limit - 1].id}", err=True)
