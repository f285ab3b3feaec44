"""What a health check asks of the database itself."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sqlalchemy import make_url, select
from sqlalchemy.orm import Session

from code_worker.store.models import db_now

__all__ = ["is_missing", "place", "server_time"]


def server_time(session: Session) -> datetime:
    """The database's own clock, by which leases are reckoned."""
    return session.execute(select(db_now())).scalar_one()


def place(url: str) -> str:
    """Where a database is, without user and password."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return f"SQLite at {parsed.database}"
    return f"PostgreSQL at {parsed.host or 'a local socket'}, database {parsed.database}"


def is_missing(url: str) -> bool:
    """Whether it is a file that is not there yet; opening the store would make an empty one."""
    parsed = make_url(url)
    return parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").expanduser().exists()
