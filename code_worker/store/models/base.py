"""The shared part of all tables: constraint names, UTC times, JSON, and the database's own clock in SQL."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Float, Index, Integer, MetaData, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.sql import ColumnElement
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

JSON_OBJECT: Final = JSON().with_variant(JSONB(), "postgresql")
BIG_KEY: Final = BigInteger().with_variant(Integer(), "sqlite")
"""A counted key: SQLite counts up only in a column of type INTEGER."""

PERSONAL: Final = {"personal": True}
"""Marks a column that may say whose image it was or what it shows: its writers ask `personal` first."""


class Base(DeclarativeBase):
    """Declarative base; the naming convention lets migrations name every constraint."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in, UTC out: `timestamptz` on PostgreSQL, text of fixed width in UTC on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuses naive times; SQLite's text drops the zone, so the time goes in as UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Always aware, always UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _Now(FunctionElement[datetime]):
    name = "code_worker_now"
    type = UtcDateTime()
    inherit_cache = True


class _TimePlus(FunctionElement[datetime]):
    name = "code_worker_time_plus"
    type = UtcDateTime()
    inherit_cache = True


@compiles(_Now, "postgresql")
def _now_postgresql(_element: _Now, _compiler: SQLCompiler, **_: Any) -> str:
    return "now()"


@compiles(_Now, "sqlite")
def _now_sqlite(_element: _Now, _compiler: SQLCompiler, **_: Any) -> str:
    # Six digits, as SQLAlchemy stores times, so that comparing text compares time.
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


@compiles(_TimePlus, "postgresql")
def _plus_postgresql(element: _TimePlus, compiler: SQLCompiler, **options: Any) -> str:
    base, seconds = (compiler.process(clause, **options) for clause in element.clauses)
    return f"({base} + make_interval(secs => {seconds}))"


@compiles(_TimePlus, "sqlite")
def _plus_sqlite(element: _TimePlus, compiler: SQLCompiler, **options: Any) -> str:
    base, seconds = (compiler.process(clause, **options) for clause in element.clauses)
    return f"strftime('%Y-%m-%d %H:%M:%f000', {base}, {seconds} || ' seconds')"


def db_now() -> ColumnElement[datetime]:
    """The database's time; on PostgreSQL that of the transaction's start."""
    return _Now()


def time_plus(base: Any, seconds: float | ColumnElement[float]) -> ColumnElement[datetime]:
    """A time column moved by a number of seconds (negative: earlier), computed in the database."""
    moved = bindparam(None, float(seconds), Float()) if isinstance(seconds, (int, float)) else seconds
    return _TimePlus(base, moved)


def db_now_plus(seconds: float | ColumnElement[float]) -> ColumnElement[datetime]:
    """The database's time moved by a number of seconds: leases never use a worker's clock."""
    return time_plus(db_now(), seconds)


def partial_index(name: str, *columns: str, where: str) -> Index:
    """An index over the rows that satisfy `where`, on both databases."""
    return Index(name, *columns, postgresql_where=text(where), sqlite_where=text(where))
