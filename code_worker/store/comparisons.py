"""What the gate compared, and what chance of error each comparison was allowed."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from code_worker.store.models import GateComparisonRow
from code_worker.store.sql import insert_new, table_of

__all__ = ["ComparisonInfo", "before", "note"]

_COMPARISONS = table_of(GateComparisonRow)


@dataclass(frozen=True, slots=True)
class ComparisonInfo:
    """One candidate beside one champion."""

    run_id: str
    candidate: str
    images: int
    level: float


def before(session: Session, champion: str, *, run_id: str) -> list[ComparisonInfo]:
    """Comparisons of other runs with a champion, the first one first.

    A run that is resumed compares the same candidate again: its own is not another chance.
    """
    table = _COMPARISONS.c
    statement = (
        select(table.run_id, table.candidate, table.images, table.level)
        .where(table.champion == champion, table.run_id != run_id)
        .order_by(table.created_at, table.run_id)
    )
    return [ComparisonInfo(**row) for row in session.execute(statement).mappings()]


def note(session: Session, *, run_id: str, champion: str, candidate: str, images: int, level: float) -> None:
    """Writes that a comparison is made, before it is: a process that dies over it has had the chance."""
    row = {"run_id": run_id, "champion": champion, "candidate": candidate, "images": images, "level": level}
    insert_new(session, GateComparisonRow, [row], same=["run_id", "champion"])
