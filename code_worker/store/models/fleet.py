"""Tables of the running system: workers, leases, paused sources, dead letters, plugins."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Index, Integer, Text, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from code_worker.store.ids import uuid7
from code_worker.store.models.base import JSON_OBJECT, PERSONAL, Base, UtcDateTime, db_now

__all__ = ["DeadLetterRow", "LeaseRow", "PluginSeenRow", "SourcePauseRow", "WorkerRow"]


class WorkerRow(Base):
    """A worker process, as it last said of itself."""

    __tablename__ = "workers"

    owner: Mapped[str] = mapped_column(Text, primary_key=True, comment="The name that its claims carry.")
    host: Mapped[str] = mapped_column(Text, comment="Machine.")
    pid: Mapped[int] = mapped_column(Integer, comment="Process id there.")
    version: Mapped[str] = mapped_column(Text, comment="Version of the code.")
    release: Mapped[str | None] = mapped_column(Text, comment="Release loaded now.")
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="First beat.")
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="Last beat.")
    info: Mapped[dict[str, Any]] = mapped_column(JSON_OBJECT, comment="Device, precision, rates, …")

    __table_args__ = (
        Index("ix_workers_seen_at", "seen_at"),
        {"comment": "Worker processes by their last beat."},
    )


class LeaseRow(Base):
    """A role that one process plays at a time, such as the sweeper."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(Text, primary_key=True, comment="The role.")
    owner: Mapped[str] = mapped_column(Text, comment="Who plays it.")
    until: Mapped[datetime] = mapped_column(UtcDateTime, comment="Until when, in the database's time.")

    __table_args__ = ({"comment": "Roles that one process plays at a time."},)


class SourcePauseRow(Base):
    """A source whose credentials do not work: nothing is fetched from it for a while."""

    __tablename__ = "source_pauses"

    source: Mapped[str] = mapped_column(Text, primary_key=True, comment="Such as s3://bucket.")
    until: Mapped[datetime] = mapped_column(UtcDateTime, comment="When it may be tried again.")
    since: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="Start of the trouble.")
    detail: Mapped[str] = mapped_column(Text, comment="What the source said.")

    __table_args__ = ({"comment": "Sources that are left alone for a while."},)


class DeadLetterRow(Base):
    """A broker message that nobody could read, kept for people."""

    __tablename__ = "dead_letters"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    task: Mapped[str] = mapped_column(Text, comment="Task it was addressed to.")
    body: Mapped[str] = mapped_column(Text, info=PERSONAL, comment="The message, cut at 64 KiB.")
    error: Mapped[str] = mapped_column(Text, info=PERSONAL, comment="Why it could not be read.")
    at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it came.")

    __table_args__ = ({"comment": "Unreadable broker messages."},)


class PluginSeenRow(Base):
    """A plugin that a host had installed: what an appeal asks for months later."""

    __tablename__ = "plugins_seen"

    host: Mapped[str] = mapped_column(Text, primary_key=True, comment="Machine.")
    name: Mapped[str] = mapped_column(Text, primary_key=True, comment="Plugin.")
    version: Mapped[str] = mapped_column(Text, primary_key=True, comment="Its version; empty for a single file.")
    distribution: Mapped[str | None] = mapped_column(Text, comment="Installed package, if any.")
    hooks: Mapped[list[str]] = mapped_column(JSON_OBJECT, comment="Hooks it implements.")
    first_seen: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="First worker start.")
    last_seen: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="Last worker start.")

    __table_args__ = ({"comment": "Plugins by host and version."},)
