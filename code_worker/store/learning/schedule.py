"""Times at which schedules fire: each is taken once, no matter who else wants it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from code_worker.store.models import ScheduleSlotRow
from code_worker.store.sql import insert_into, table_of

_SLOTS = table_of(ScheduleSlotRow)


@dataclass(frozen=True, slots=True)
class Slot:
    """A time at which a schedule was due and what came of it."""

    name: str
    slot: datetime
    run_id: str | None
    outcome: str
    created_at: datetime


_COLUMNS = tuple(_SLOTS.c[name] for name in Slot.__dataclass_fields__)


def take(session: Session, name: str, slot: datetime, *, run_id: str | None, outcome: str) -> bool:
    """Takes a slot; False when it is taken. The same run takes the same slot as often as it likes."""
    row = {"name": name, "slot": slot, "run_id": run_id, "outcome": outcome}
    session.execute(insert_into(session, ScheduleSlotRow).on_conflict_do_nothing().values(row))
    holder = select(_SLOTS.c.run_id, _SLOTS.c.outcome).where(_SLOTS.c.name == name, _SLOTS.c.slot == slot)
    found = session.execute(holder).one()
    return run_id is not None and found.run_id == run_id


def last(session: Session, name: str) -> Slot | None:
    """The newest slot that a schedule took, or None."""
    newest = select(*_COLUMNS).where(_SLOTS.c.name == name).order_by(_SLOTS.c.slot.desc()).limit(1)
    row = session.execute(newest).mappings().one_or_none()
    return None if row is None else Slot(**row)
