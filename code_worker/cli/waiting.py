"""Waits for verdicts and prints each as it is decided, in the order in which the jobs were accepted."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from code_worker.cli.interrupts import check_interrupt
from code_worker.cli.ledger import open_ledger
from code_worker.cli.output import plural, print_json, say
from code_worker.cli.progress import progress
from code_worker.cli.records import judgement, verdict_record
from code_worker.types import Outcome

if TYPE_CHECKING:
    from code_worker.cli.enqueue_list import Accepted
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.types import Verdict

__all__ = ["print_verdicts"]

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
        from code_worker.worker.waits import why_waiting

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
