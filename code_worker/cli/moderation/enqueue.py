"""`code-worker enqueue`: images named one by one, under a prefix, or in a list; waits for verdicts when asked."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, Final

import click

from code_worker.cli.common.arguments import JSON_OBJECT, json_option
from code_worker.cli.common.database import has_database, no_database, open_ledger, quiet_settings
from code_worker.cli.common.image_inputs import say_left_out
from code_worker.cli.common.interrupts import check_interrupt
from code_worker.cli.common.output import plural, print_json, say, shown_json, to_json
from code_worker.cli.common.progress import progress
from code_worker.cli.common.records import judgement, verdict_record
from code_worker.cli.moderation.enqueue_list import (
    Accepted,
    Done,
    Line,
    accept_lines,
    listed_lines,
    named_lines,
    prefix_lines,
    unread_schemes,
)
from code_worker.errors import CodeWorkerError, ConfigurationError, UnknownHeadError
from code_worker.images.listing import LeftOut
from code_worker.logs import redact
from code_worker.settings import Settings
from code_worker.types import Outcome

if TYPE_CHECKING:
    from code_worker.store.engine import Store
    from code_worker.types import Verdict

_POLL_S: Final = 0.2
_PATIENCE_S: Final = 3.0
"""A job that is decided sooner needs no explanation."""
_AGAIN_S: Final = 5.0
_NAMED: Final = 3
_ASKED: Final = 500
"""Jobs that are asked for at most: the first of a long list stand for the others."""


class _Reasons:
    """Says on stderr why jobs wait, whenever that changes."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._said: frozenset[str] = frozenset()
        self._next = time.monotonic() + _PATIENCE_S

    def say(self, accepted: Sequence[Accepted], done: int, *, now: bool = False) -> None:
        """Looks again every few seconds, or now, at those after the first `done`; nothing is said twice."""
        if not now and time.monotonic() < self._next:
            return
        waiting = accepted[done:]
        self._next = time.monotonic() + _AGAIN_S
        lines = self._lines(waiting)
        for reason, line in lines.items():
            if now or reason not in self._said:
                say(line, err=True)
        self._said = frozenset(lines)

    def _lines(self, waiting: Sequence[Accepted]) -> dict[str, str]:
        from code_worker.doctor.fleet import why_waiting

        # A sample: of a million jobs that wait, the reasons are few and the queries would be many.
        asked = waiting[:_ASKED]
        reasons = why_waiting(self._settings, self._store, [one.job_id for one in asked])
        jobs: defaultdict[str, list[str]] = defaultdict(list)
        for job_id, reason in reasons.items():
            jobs[reason].append(job_id)
        more = len(waiting) - len(asked)
        beside = f" (of the first {len(asked)} of {len(waiting)})" if more else ""
        return {
            reason: f"{plural(len(ids), 'job waits', 'jobs wait')}{beside}: {reason}: {_some(ids)}"
            for reason, ids in jobs.items()
        }


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (", …" if len(ids) > _NAMED else "")


def print_verdicts(
    settings: Settings,
    accepted: Sequence[Accepted],
    timeout_s: float | None,
    *,
    as_json: bool,
    on_verdict: Callable[[], object],
) -> bool:
    """Returns once every job has a verdict or the time is up; True when all were judged.

    `on_verdict` is called for each verdict that was written.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    all_judged = True
    bar = progress("waiting for verdicts", len(accepted), beside_rows=True)
    with open_ledger(settings) as store, bar as advance:
        reasons = _Reasons(settings, store)
        for number, one in enumerate(accepted):
            verdict = _await(store, one.job_id, deadline, partial(reasons.say, accepted, number))
            if verdict is None:
                left = plural(len(accepted) - number, "job is not decided", "jobs are not decided")
                say(f"gave up after {timeout_s:g} s: {left}", err=True)
                reasons.say(accepted, number, now=True)
                return False
            advance(1)
            if as_json:
                print_json(verdict_record(verdict))
            else:
                say(_line(verdict))
            on_verdict()
            all_judged &= verdict.outcome is Outcome.JUDGED
    return all_judged


def _await(store: Store, job_id: str, deadline: float | None, meanwhile: Callable[[], object]) -> Verdict | None:
    """The job's verdict; None once the time is up."""
    from code_worker.store.verdicts import live

    # Asked of the ledger: results of Celery are off, and a message may be lost where a verdict is not.
    while (verdict := store.run(lambda session: live(session, job_id), write=False)) is None:
        if deadline is not None and time.monotonic() > deadline:
            return None
        meanwhile()
        time.sleep(_POLL_S)
        check_interrupt()
    return verdict


def _line(verdict: Verdict) -> str:
    score = "" if verdict.score is None else f"{verdict.score:.3f}"
    why = f"  ({verdict.detail})" if verdict.detail else ""
    return f"{judgement(verdict):<18} {score:>5}  {verdict.uri}{why}"


_SHOWN = 20


@click.command()
@click.argument("uris", metavar="[URI]…", nargs=-1)
@click.option("--prefix", metavar="s3://BUCKET/PREFIX", help="Every object under it.")
@click.option(
    "--from",
    "listed",
    type=click.File("rb"),
    metavar="FILE|-",
    help='A list: URIs or objects such as {"uri": "s3://b/a.jpg", "tenant": "acme"}, one per line or in an array; '
    "or names that each end in a NUL. Lines that begin with # are passed over.",
)
@click.option("--head", help="Head to judge with; unset: what plugins, policy and settings say.")
@click.option("--tenant", help="Whose images; chooses the policy.")
@click.option("--content-type", help="Kind of content (avatar, listing …); chooses the policy.")
@click.option("--priority", type=click.IntRange(0, 9), help="0-3 backfill, 4-6 normal (default 4), 7-9 live.")
@click.option("--key", help="Idempotency key, for one image: the same key twice is one job.")
@click.option("--metadata", type=JSON_OBJECT, metavar="JSON", help="Object handed through to the verdicts.")
@click.option("--wait", is_flag=True, help="Wait for the verdicts and print them.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="With --wait: give up after so long."
)
@json_option
def enqueue(
    *,
    uris: Sequence[str],
    prefix: str | None,
    listed: IO[bytes] | None,
    wait: bool,
    timeout: float | None,
    as_json: bool,
    **common: Any,
) -> None:
    """Enqueue images for the workers to judge.

    Of a directory every image in it is enqueued, as `scan` finds them. Paths are made absolute; workers must be able
    to read them there. A line of a list that cannot be accepted is
    named on stderr and does not stop the others.

    Exit status: 0 all accepted (with --wait: and judged); 1 a line was refused, an image rejected, the time is up, or
    it was interrupted or its output is full or was closed, and what was accepted is named on stderr; 2 wrong use or
    configuration.
    """
    if sum((bool(uris), prefix is not None, listed is not None)) != 1:
        raise click.UsageError("name URIs, or --prefix, or --from: exactly one of them")
    if common["key"] and len(uris) != 1:
        raise click.UsageError("--key names one job: give exactly one URI, or keys in the lines of --from")
    settings = quiet_settings()
    if not has_database(settings):
        raise ConfigurationError(no_database(settings))
    left_out = LeftOut()
    given = {name: value for name, value in common.items() if value is not None}
    lines = _with_head_checked(settings, _lines(settings, uris, prefix, listed, left_out), given)
    tally = _Tally()
    with _told_when_it_breaks_off(tally), closing(lines):
        refused = _enqueue(settings, lines, given, tally, keep=wait, as_json=as_json)
        say_left_out(left_out)
        judged = not wait or print_verdicts(settings, tally.kept, timeout, as_json=as_json, on_verdict=tally.decide)
    raise SystemExit(1 if refused or left_out.unreadable or not judged else 0)


@dataclass(slots=True)
class _Tally:
    """Jobs that are in the ledger, and of which nothing was written yet.

    Attributes:
        kept: all with `--wait`, else the first, or in JSON those that are not written.
        untold: how many there are.
        decided: how many of those kept have a verdict that was written; they come first.
        accepting: whether a transaction of others may be under way.
    """

    kept: list[Accepted] = field(default_factory=list)
    untold: int = 0
    decided: int = 0
    accepting: bool = True

    def decide(self) -> None:
        """A verdict was written."""
        self.decided += 1
        self.untold -= 1


@contextmanager
def _told_when_it_breaks_off(tally: _Tally) -> Iterator[None]:
    """Says on stderr which jobs are in the ledger where nobody read it on stdout, or somebody stopped waiting."""
    try:
        yield
    except (KeyboardInterrupt, CodeWorkerError):
        if tally.untold:
            say(f"{plural(tally.untold, 'job was', 'jobs were')} accepted and will still be judged:", err=True)
            _name(tally)
        if tally.accepting and tally.untold:
            say("what was being accepted just then may be in the ledger too: code-worker jobs list", err=True)
        raise
    except OSError:
        _name(tally)
        raise


def _name(tally: _Tally) -> None:
    shown = tally.kept[tally.decided : tally.decided + _SHOWN]
    for one in shown:
        say(f"accepted all the same: {one.job_id}  {one.uri}", err=True)
    if tally.untold > len(shown):
        say(f"and {tally.untold - len(shown):,} more: code-worker jobs list", err=True)


def _with_head_checked(settings: Settings, lines: Generator[Line], common: Mapping[str, Any]) -> Generator[Line]:
    """The lines; before the first that would be a new job by `--head`, for all of them, whether there is that head.

    A line with a key may name a job that is there already, by a head that has gone since.

    Raises:
        UnknownHeadError: the champion has no such head.
    """
    checked = "head" not in common or "key" in common
    # What it reads from is closed when this fails, and not when the traceback is forgotten.
    with closing(lines):
        for line in lines:
            if not checked and not line.problem and not {"head", "key"} & line.item.keys():
                _check_head(settings, common["head"])
                checked = True
            yield line


def _check_head(settings: Settings, head: str) -> None:
    """Raises UnknownHeadError when the champion has no such head; without a champion any name is taken."""
    from code_worker.store import releases

    with open_ledger(settings) as store:
        known = store.run(releases.champions_heads, write=False)
    if known and head not in known:
        raise UnknownHeadError(head, known)


def _lines(
    settings: Settings, uris: Sequence[str], prefix: str | None, listed: IO[bytes] | None, left_out: LeftOut
) -> Generator[Line]:
    if prefix is not None:
        return prefix_lines(settings, prefix)
    return listed_lines(listed) if listed else named_lines(settings, uris, left_out)


def _enqueue(
    settings: Settings,
    lines: Iterator[Line],
    common: dict[str, Any],
    tally: _Tally,
    *,
    keep: bool,
    as_json: bool,
) -> int:
    """Accepts lines, and returns how many were not; `keep` all that were accepted."""
    from code_worker.client import Client

    count = refused = 0
    told: set[str] = set()
    kept = tally.kept
    bar = progress("enqueueing jobs", counted=True, beside_rows=as_json)
    with closing(Client(settings)) as client, bar as advance:
        for done in accept_lines(client, lines, common):
            _say_problems(done, told)
            refused += len(done.refused)
            count += len(done.accepted)
            tally.untold += len(done.accepted)
            advance(len(done.refused) + len(done.accepted))
            if as_json and not keep:
                # Before the rows are written: if the output breaks off, these are named on stderr.
                kept[:] = done.accepted
                rows = ({"job": one.job_id, "uri": one.uri} for one in done.accepted)
                click.echo("".join(f"{shown_json(to_json(row), sys.stdout)}\n" for row in rows), nl=False)
                kept.clear()
                tally.untold = 0
            else:
                kept += done.accepted if keep else islice(done.accepted, max(0, _SHOWN + 1 - len(kept)))
    tally.accepting = False
    if not as_json and not keep:
        for one in kept if count <= _SHOWN else ():
            say(f"{one.job_id}  {one.uri}")
        lines_refused = f", {plural(refused, 'line')} refused" if refused else ""
        say(f"{plural(count, 'job')} accepted{lines_refused}", err=True)
    return refused


def _say_problems(done: Done, told: set[str]) -> None:
    """Names what was refused, and schemes that no source reads, except those that were `told` before."""
    for line, problem in done.refused:
        say(redact(f"{line}: {problem}"), err=True)
    for scheme in sorted(unread_schemes(done.accepted) - told):
        say(f"{scheme}:// is not read: workers reject such images; write s3://… or file://…", err=True)
        told.add(scheme)
