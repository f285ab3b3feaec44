"""Statements that the two databases spell or speed up differently: INSERT … ON CONFLICT and lists of ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from sqlalchemy import JSON, ColumnElement, Table, Uuid, bindparam, cast, func, literal, literal_column, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from sqlalchemy.types import NullType

from code_worker.store.ids import NEW_ID, uuid7
from code_worker.store.models import Base, db_now
from code_worker.wire import chunks

IN_LIST: Final = 1000
"""Ids in one `IN (…)`: well under both databases' limits on parameters, and few enough statements."""


def table_of(row: type[Base]) -> Table:
    """The Core table behind a mapped class; bulk statements go there, past the ORM's bookkeeping."""
    table = row.__table__
    assert isinstance(table, Table)  # noqa: S101 - a mapped class of ours always has one
    return table


def among(session: Session, column: ColumnElement[str], ids: Iterable[str]) -> ColumnElement[bool]:
    """Returns whether a UUID column is one of the ids, which must be spelt canonically.

    On PostgreSQL they go as one parameter: the statement is the same for any number, so it stays prepared.
    """
    if _is_sqlite(session):
        return column.in_(list(ids))
    # Without a type of its own the parameter is an array at once; text would be cast anew for every row looked at.
    # Canonical ids hold no comma, quote or brace, so the array's text needs no escaping.
    listed = cast(literal("{" + ",".join(ids) + "}", NullType()), postgresql.ARRAY(Uuid(as_uuid=False)))
    return column == func.any(listed)


def new_id(session: Session) -> str:
    """A new id in the order of the database's time, as `Store.new_id`; for rows of which a retry may make others."""
    made: str = session.info.get(NEW_ID, uuid7)()
    return made


def unindexed(column: ColumnElement[str]) -> ColumnElement[str]:
    """A text column that no index is used for: beside a list of ids it must only sift what the primary key found.

    Whether few or many jobs have a state changes faster than the planner's statistics; by an index on the state it
    would read the whole backlog for each message.
    """
    return column.concat("")


def insert_into(session: Session, row: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """An insert with `on_conflict_do_nothing` and `on_conflict_do_update`, for the session's database."""
    make = sqlite.insert if _is_sqlite(session) else postgresql.insert
    return make(table_of(row))


def insert_new(
    session: Session,
    row: type[Base],
    values: Sequence[Mapping[str, Any]],
    *,
    same: Sequence[str],
    constants: Mapping[str, Any] | None = None,
    fresh: str | None = None,
) -> set[str]:
    """Inserts the rows that are not there yet, judged by the columns `same`.

    Args:
        session: the unit of work.
        row: the mapped class.
        values: rows with the same columns each. Callers sort them by key: two transactions that insert the same
            rows then wait for each other instead of deadlocking.
        same: columns of the unique constraint that makes a row the same row.
        constants: SQL expressions that every row gets.
        fresh: a column whose values nothing else in the database has.

    Returns:
        Values of `fresh` in those of the rows that are there now, written by this call or by an earlier run of its
        transaction, whose answer was lost; empty without `fresh`.
    """
    if not values:
        return set()
    insert_them = _insert_many if _is_sqlite(session) else _insert_as_json
    return insert_them(session, row, values, same=same, constants=constants or {}, fresh=fresh)


def _insert_many(
    session: Session,
    row: type[Base],
    values: Sequence[Mapping[str, Any]],
    *,
    same: Sequence[str],
    constants: Mapping[str, Any],
    fresh: str | None,
) -> set[str]:
    statement = insert_into(session, row).on_conflict_do_nothing(index_elements=same)
    session.connection().execute(statement.values(constants) if constants else statement, values)
    return set() if fresh is None else _there(session, row, fresh, {value[fresh] for value in values})


def _there(session: Session, row: type[Base], column: str, values: Iterable[str]) -> set[str]:
    found, which = set[str](), table_of(row).c[column]
    for some in chunks(values, IN_LIST):
        found.update(session.scalars(select(which).where(which.in_(some))))
    return found


def _insert_as_json(
    session: Session,
    row: type[Base],
    values: Sequence[Mapping[str, Any]],
    *,
    same: Sequence[str],
    constants: Mapping[str, Any],
    fresh: str | None,
) -> set[str]:
    names, unique = tuple(values[0]), tuple(same)
    # Constants are expressions, made anew each time: they are no key for a cache.
    statement = _json_insert_with(row, names, unique, constants) if constants else _json_insert(row, names, unique)
    listed = {"rows": json.dumps(values, allow_nan=False, default=_as_text)}
    if fresh is None:
        session.execute(statement, listed)
        return set()
    written = set(session.scalars(statement.returning(table_of(row).c[fresh]), listed))
    # Nearly always all are; what is not may be another's row, or our own from a run whose answer was lost.
    return written | _there(session, row, fresh, {value[fresh] for value in values} - written)


@cache
def _json_insert(row: type[Base], names: tuple[str, ...], same: tuple[str, ...]) -> postgresql.Insert:
    """Building the statement for 30 columns takes as long as sending it."""
    return _json_insert_with(row, names, same, {})


def _json_insert_with(
    row: type[Base], names: tuple[str, ...], same: tuple[str, ...], constants: Mapping[str, Any]
) -> postgresql.Insert:
    # One parameter instead of 30 per row: measured at 2.5 times the rate of `executemany` in pipeline mode.
    table = table_of(row)
    listed = cast(bindparam("rows", type_=postgresql.VARCHAR()), JSON)
    # The table's own row type: the server casts each field as its column demands.
    records = func.json_populate_recordset(literal_column(f"NULL::{table.name}"), listed).table_valued(
        *(table.c[name] for name in names), name="fresh_rows"
    )
    source = select(*(records.c[name] for name in names), *constants.values())
    statement = postgresql.insert(table).from_select([*names, *constants], source)
    return statement.on_conflict_do_nothing(index_elements=same)


def _as_text(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} cannot be stored")
    return "\\x" + value.hex()


def _is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def is_plain(text: str) -> bool:
    """Returns whether both databases can store this text: no NUL, no lone surrogate."""
    if text.isascii():
        return "\0" not in text
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def plain(text: str, limit: int) -> str:
    """Text from outside made storable: no NUL, no lone surrogate, not longer than `limit`."""
    cut = text[:limit]
    # A text that cannot be stored would fail a whole batch, so what is for people is mended and not refused.
    return cut if is_plain(cut) else cut.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def database_time(session: Session, clock: ColumnElement[datetime] | None = None) -> datetime:
    """Returns the database's own time, in UTC: that of the transaction, or of another clock that it has."""
    now: datetime = session.execute(select(db_now() if clock is None else clock)).scalar_one()
    return now.astimezone(UTC)
