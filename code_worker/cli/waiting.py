"""Waits for verdicts and prints each as it is decided, in the order in which the jobs were accepted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from code_worker.cli.ledger import open_ledger
from code_worker.cli.output import say, to_json
from code_worker.cli.progress import progress
from code_worker.cli.records import judgement, verdict_record
from code_worker.types import Outcome

if TYPE_CHECKING:
    from code_worker.cli.enqueue_list import Accepted
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.types import Verdict

__all__ = ["print_verdicts"]

_POLL_S = 0.2


def print_verdicts(
    settings: Settings, accepted: Sequence[Accepted], timeout_s: float | None, *, as_json: bool
) -> bool:
    """Returns once every job has a verdict or the time is up; True when all were judged."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    all_judged = True
    bar = progress("waiting for verdicts", len(accepted), beside_rows=True)
    with open_ledger(settings) as store, bar as advance:
        for number, one in enumerate(accepted):
            verdict = _await(store, one.job_id, deadline)
            if verdict is None:
                say(f"gave up after {timeout_s:g} s: {len(accepted) - number} jobs are not decided", err=True)
                return False
            advance(1)
            click.echo(to_json(verdict_record(verdict)) if as_json else _line(verdict))
            all_judged &= verdict.outcome is Outcome.JUDGED
    return all_judged


def _await(store: Store, job_id: str, deadline: float | None) -> Verdict | None:
    from code_worker.store.verdicts import live  # noqa: PLC0415 - SQLAlchemy, not for --help

    while (verdict := store.run(lambda session: live(session, job_id), write=False)) is None:
        if deadline is not None and time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    return verdict


def _line(verdict: Verdict) -> str:
    score = "" if verdict.score is None else f"{verdict.score:.3f}"
    return f"{judgement(verdict):<18} {score:>5}  {verdict.uri}"
