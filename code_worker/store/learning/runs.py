"""Training runs, one at a time in the whole deployment, and the slots of schedules that started them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import RowMapping, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql import ColumnElement

from code_worker.errors import RunLostError, StoreError
from code_worker.store import audit, releases
from code_worker.store.ids import as_uuid
from code_worker.store.models import RunMetricsRow, RunRow, ScheduleSlotRow, SnapshotRow, db_now, db_now_plus
from code_worker.store.releases import CHAMPION
from code_worker.store.sql import insert_into, insert_new, plain, table_of
from code_worker.system.failpoints import failpoint

_RUNS = table_of(RunRow)
_METRICS = table_of(RunMetricsRow)
_SNAPSHOTS = table_of(SnapshotRow)
_MAX_REASON: Final = 2000
_LAPSED_S: Final = -10 * 365 * 86_400.0
ENDED: Final = ("promoted", "rejected", "failed", "skipped")


@dataclass(frozen=True, slots=True)
class Run:
    """A retrain or refit; `finished_at` is None while its state is `running`."""

    id: str
    kind: str
    state: str
    stage: str
    by: str
    attempts: int
    owner: str | None
    token: int
    config: Mapping[str, Any]
    snapshot_id: str | None
    base_release: str | None
    candidate: str | None
    reasons: Sequence[str]
    report: Mapping[str, Any]
    created_at: datetime
    heartbeat_at: datetime
    finished_at: datetime | None

    @property
    def lease(self) -> Lease:
        """Returns what its process writes with."""
        return Lease(self.id, self.token, self.owner or "")


@dataclass(frozen=True, slots=True)
class Lease:
    """A process's hold on a run: a write with a token that is not the run's present one is refused."""

    run_id: str
    token: int
    owner: str


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """The figures of a run at one step."""

    epoch: int
    step: int
    metrics: Mapping[str, float]


_COLUMNS = tuple(_RUNS.c[name] for name in Run.__dataclass_fields__)


def start(
    session: Session,
    *,
    id: str,
    kind: str,
    by: str,
    owner: str,
    config: Mapping[str, Any],
    base_release: str | None,
) -> Run | None:
    """Begins a run that `owner` holds; None while another one is running. The same id again is the same run."""
    row = {
        "id": id,
        "kind": kind,
        "state": "running",
        "stage": "started",
        "by": by,
        "attempts": 1,
        "owner": owner,
        "token": 1,
        "config": dict(config),
        "base_release": base_release,
        "reasons": [],
        "report": {},
    }
    # Any conflict: the same id, or a run under way, of which
    # uq_runs_running allows one. `get` then tells which it was.
    session.execute(insert_into(session, RunRow).on_conflict_do_nothing().values(row))
    return get(session, id)


def take_over(session: Session, *, owner: str, lapse_s: float) -> Run | None:
    """Takes the running run whose process gave no sign of life for `lapse_s`; None if there is none such.

    `owner` must be a new name for each call: a retry of the transaction then finds its own work.
    """
    if (mine := running(session)) is not None and mine.owner == owner:
        return mine
    statement = (
        update(_RUNS)
        # The condition is in the UPDATE: of two that see a lapsed run the second waits for the row, and finds a fresh
        # sign of life. The token fences the old holder, which may only have slept: its next write matches no row.
        .where(_RUNS.c.state == "running", _RUNS.c.heartbeat_at <= db_now_plus(-lapse_s))
        .values(owner=owner, token=_RUNS.c.token + 1, attempts=_RUNS.c.attempts + 1, heartbeat_at=db_now())
    )
    taken = session.execute(statement.returning(*_COLUMNS)).mappings().one_or_none()
    return None if taken is None else _run(taken)


def hold(session: Session, lease: Lease) -> None:
    """Gives a sign of life.

    Raises:
        RunLostError: another process took the run over, or it has ended.
    """
    _write(session, lease, {})


def note(session: Session, lease: Lease, **columns: Any) -> None:
    """Writes columns of the run (`stage`, `snapshot_id`, `base_release`, `candidate`, `report`).

    Raises:
        RunLostError: as `hold`.
    """
    _write(session, lease, columns)


def finish(
    session: Session,
    lease: Lease,
    state: str,
    *,
    reasons: Sequence[str] = (),
    report: Mapping[str, Any] | None = None,
) -> None:
    """Ends the run; ending it again the same way changes nothing.

    Raises:
        RunLostError: as `hold`.
        ValueError: a state that is no end.
    """
    if state not in ENDED:
        raise ValueError(f"{state!r} is no end of a run; one of {', '.join(ENDED)}")
    if session.scalar(_mine(lease, _RUNS.c.state == state)) is not None:
        return  # the commit was done, its answer lost
    columns: dict[str, Any] = {"state": state, "reasons": [plain(reason, _MAX_REASON) for reason in reasons]}
    if report is not None:
        columns["report"] = dict(report)
    _write(session, lease, {**columns, "finished_at": db_now()})
    if state == "rejected":
        _record_rejection(session, lease, reasons)


def _record_rejection(session: Session, lease: Lease, reasons: Sequence[str]) -> None:
    if (run := get(session, lease.run_id)) is None:
        return
    details = {"run": run.id, "kind": run.kind, "reasons": [audit.blank(reason) for reason in reasons]}
    audit.record(
        session, actor=run.by, action="release.reject", subject=run.candidate or f"run {run.id}", details=details
    )


def promote(
    session: Session,
    lease: Lease,
    release: str,
    *,
    champion: str | None,
    by: str,
    reasons: Sequence[str],
    report: Mapping[str, Any],
    challenge: bool = False,
) -> bool:
    """Ends the run and makes its release the champion, both or neither; with `challenge` the challenger.

    Nothing happens, and it returns False, when the champion is not the one that the release was compared with.

    Raises:
        RunLostError: as `hold`.
        StoreError: there is no such release.
    """
    if session.scalar(_mine(lease, _RUNS.c.state == "promoted")) is not None:
        return True  # the commit was done, its answer lost
    hold(session, lease)
    # The run's row first (`hold`), then the alias: who moves the alias by hand never holds a run's row.
    if releases.alias(session, CHAMPION, lock=True) != champion:
        return False
    reason = f"run {lease.run_id}"
    if challenge:
        releases.challenge(session, release, by=by, reason=reason)
    elif releases.move_alias(session, CHAMPION, release, by=by, reason=reason) != champion:
        raise StoreError("the champion was moved by somebody else just now")
    finish(session, lease, "promoted", reasons=reasons, report=report)
    failpoint("mid_run_promotion")
    return True


def let_go(session: Session, lease: Lease) -> None:
    """Leaves the run to the next process, which needs not wait; an attempt that ends in order does not count.

    Raises:
        RunLostError: as `hold`.
    """
    if session.scalar(_mine(lease, _RUNS.c.state == "running", _RUNS.c.owner.is_(None))) is not None:
        return  # the commit was done, its answer lost
    _write(session, lease, {"heartbeat_at": db_now_plus(_LAPSED_S), "attempts": _RUNS.c.attempts - 1, "owner": None})


def release_owner(session: Session, owner: str) -> bool:
    """The process of this name died: what it held is free at once. Its leases are called `owner:…`."""
    # A name may hold `_` or `%`, which LIKE would take for wildcards.
    dead = _RUNS.c.owner.startswith(f"{owner}:", autoescape=True)
    lapsed = update(_RUNS).where(_RUNS.c.state == "running", dead).values(heartbeat_at=db_now_plus(_LAPSED_S))
    return session.scalar(lapsed.returning(_RUNS.c.id)) is not None


def add_metrics(session: Session, lease: Lease, measured: Sequence[RunMetrics]) -> None:
    """Adds points of the curves; a step that is there already stays as it is.

    Raises:
        RunLostError: as `hold`.
    """
    hold(session, lease)
    rows = [
        {"run_id": lease.run_id, "epoch": one.epoch, "step": one.step, "metrics": dict(one.metrics)}
        for one in sorted(measured, key=lambda one: one.step)
    ]
    insert_new(session, RunMetricsRow, rows, same=["run_id", "step"], constants={"created_at": db_now()})


def metrics(session: Session, run_id: str) -> list[RunMetrics]:
    """The curves of a run, by step."""
    rows = session.execute(
        select(_METRICS.c.epoch, _METRICS.c.step, _METRICS.c.metrics)
        .where(_METRICS.c.run_id == run_id)
        .order_by(_METRICS.c.step)
    )
    return [RunMetrics(**row) for row in rows.mappings()]


def get(session: Session, run_id: str) -> Run | None:
    """One run, or None."""
    if (known := as_uuid(run_id)) is None:
        return None
    return _one(session, _RUNS.c.id == known)


def running(session: Session) -> Run | None:
    """The run that is under way, or waits to be taken over."""
    return _one(session, _RUNS.c.state == "running")


def lapsed(session: Session, *, lapse_s: float) -> bool:
    """Returns whether a run waits to be taken over."""
    waits = select(_RUNS.c.id).where(_RUNS.c.state == "running", _RUNS.c.heartbeat_at <= db_now_plus(-lapse_s))
    return session.scalar(waits) is not None


def ancestry(session: Session, named: Iterable[str]) -> dict[str, list[Run]]:
    """These releases and those that they go back to, nearest first; each with the runs that made it, newest first.

    Runs without a snapshot do not count. A release without a run was imported, or registered by hand: nothing here
    says what it learned from, and there the line ends.
    """
    kept = _RUNS.c.snapshot_id.in_(select(_SNAPSHOTS.c.id))
    found: dict[str, list[Run]] = {}
    waiting = deque(named)
    while waiting:
        # Also what ends a circle: two releases can name each other where somebody registered one by hand.
        if (release := waiting.popleft()) in found:
            continue
        made = select(*_COLUMNS).where(_RUNS.c.candidate == release, kept).order_by(_RUNS.c.id.desc())
        found[release] = [_run(row) for row in session.execute(made).mappings()]
        waiting.extend(run.base_release for run in found[release] if run.base_release is not None)
    return found


def concluded(session: Session, *, kind: str, digest: str) -> Run | None:
    """The last run of this kind that came to a judgement on a snapshot of this digest; by a gate, not by a person."""
    alike = select(_SNAPSHOTS.c.id).where(_SNAPSHOTS.c.digest == digest)
    judged = _RUNS.c.state.in_(("promoted", "rejected"))
    conditions = (_RUNS.c.kind == kind, judged, _RUNS.c.snapshot_id.in_(alike))
    newest = select(*_COLUMNS).where(*conditions).order_by(_RUNS.c.id.desc())
    found = (_run(row) for row in session.execute(newest).mappings())
    return next((run for run in found if not run.config.get("challenge")), None)


def list_runs(
    session: Session,
    *,
    kind: str | None = None,
    state: str | None = None,
    after: str | None = None,
    limit: int = 100,
) -> list[Run]:
    """Runs, newest first, after the id `after` of the page before.

    Raises:
        StoreError: `after` is no id.
    """
    statement = select(*_COLUMNS).order_by(_RUNS.c.id.desc()).limit(limit)
    if kind is not None:
        statement = statement.where(_RUNS.c.kind == kind)
    if state is not None:
        statement = statement.where(_RUNS.c.state == state)
    if after is not None:
        if (last := as_uuid(after)) is None:
            raise StoreError(f"{after!r} is no id of a run to continue the list after")
        statement = statement.where(_RUNS.c.id < last)
    return [_run(row) for row in session.execute(statement).mappings()]


def _one(session: Session, *conditions: ColumnElement[bool]) -> Run | None:
    newest = select(*_COLUMNS).where(*conditions).order_by(_RUNS.c.id.desc()).limit(1)
    row = session.execute(newest).mappings().one_or_none()
    return None if row is None else _run(row)


def _run(row: RowMapping) -> Run:
    return Run(**row)


def _mine(lease: Lease, *conditions: ColumnElement[bool]) -> Any:
    return select(_RUNS.c.id).where(_RUNS.c.id == lease.run_id, _RUNS.c.token == lease.token, *conditions)


def _write(session: Session, lease: Lease, columns: Mapping[str, Any]) -> None:
    mine = (_RUNS.c.id == lease.run_id, _RUNS.c.token == lease.token, _RUNS.c.owner == lease.owner)
    # Every write is a sign of life; `let_go` alone says otherwise, in `columns`.
    values = {"heartbeat_at": db_now(), **columns}
    written = update(_RUNS).where(*mine, _RUNS.c.state == "running").values(values).returning(_RUNS.c.id)
    if session.scalar(written) is None:
        raise RunLostError(
            f"run {lease.run_id} is not this process's any more: see `code-worker runs show {lease.run_id}`"
        )


_SLOTS = table_of(ScheduleSlotRow)


@dataclass(frozen=True, slots=True)
class Slot:
    """A time at which a schedule was due and what came of it."""

    name: str
    slot: datetime
    run_id: str | None
    outcome: str
    created_at: datetime


_SLOT_COLUMNS = tuple(_SLOTS.c[name] for name in Slot.__dataclass_fields__)


def take_slot(session: Session, name: str, slot: datetime, *, run_id: str | None, outcome: str) -> bool:
    """Takes a slot; False when it is taken. The same run takes the same slot as often as it likes."""
    row = {"name": name, "slot": slot, "run_id": run_id, "outcome": outcome}
    session.execute(insert_into(session, ScheduleSlotRow).on_conflict_do_nothing().values(row))
    holder = select(_SLOTS.c.run_id, _SLOTS.c.outcome).where(_SLOTS.c.name == name, _SLOTS.c.slot == slot)
    # Read back in the same transaction: a trainer that repeats it after a lost answer finds its own run there.
    found = session.execute(holder).one()
    return run_id is not None and found.run_id == run_id


def last_slot(session: Session, name: str) -> Slot | None:
    """The newest slot that a schedule took, or None."""
    newest = select(*_SLOT_COLUMNS).where(_SLOTS.c.name == name).order_by(_SLOTS.c.slot.desc()).limit(1)
    row = session.execute(newest).mappings().one_or_none()
    return None if row is None else Slot(**row)
