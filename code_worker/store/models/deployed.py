"""Tables of what judges: releases, the aliases that point to them, and policies."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, Integer, String, Text, UniqueConstraint, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from code_worker.store.ids import uuid7
from code_worker.store.models.base import BIG_KEY, JSON_OBJECT, Base, UtcDateTime, db_now

__all__ = ["AliasMoveRow", "AliasRow", "PolicyRecord", "ReleaseRow"]


class ReleaseRow(Base):
    """A release that was imported or trained; its files lie in the artifact store."""

    __tablename__ = "releases"

    id: Mapped[str] = mapped_column(Text, primary_key=True, comment="Derived from the manifest's hash.")
    manifest_sha256: Mapped[str] = mapped_column(String(64), comment="Of the manifest's bytes.")
    location: Mapped[str] = mapped_column(Text, comment="Where the files are, under the artifact root.")
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON_OBJECT, comment="The manifest itself.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was registered.")
    source: Mapped[str] = mapped_column(Text, comment="Where it came from.")
    status: Mapped[str] = mapped_column(Text, comment="ready, or why it must not be promoted.")

    __table_args__ = (
        Index("ix_releases_created_at", "created_at"),
        {"comment": "Encoder, heads and thresholds deployed as one."},
    )


class AliasRow(Base):
    """`champion` and its like: a name that points to one release."""

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(Text, primary_key=True, comment="champion, challenger, …")
    release_id: Mapped[str] = mapped_column(ForeignKey("releases.id"), comment="Where it points now.")
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="Last move.")
    updated_by: Mapped[str] = mapped_column(Text, comment="Who moved it.")

    __table_args__ = ({"comment": "Names that point to releases."},)


class AliasMoveRow(Base):
    """One move of an alias; a trigger refuses UPDATE."""

    __tablename__ = "alias_moves"

    id: Mapped[int] = mapped_column(BIG_KEY, primary_key=True, autoincrement=True, comment="Order of the moves.")
    alias: Mapped[str] = mapped_column(Text, comment="Which name.")
    release_id: Mapped[str] = mapped_column(ForeignKey("releases.id"), comment="Where it points afterwards.")
    previous_id: Mapped[str | None] = mapped_column(ForeignKey("releases.id"), comment="Where it pointed before.")
    undoes: Mapped[int | None] = mapped_column(ForeignKey("alias_moves.id"), comment="The move that this took back.")
    at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When.")
    by: Mapped[str] = mapped_column(Text, comment="Who.")
    reason: Mapped[str] = mapped_column(Text, comment="Why.")

    __table_args__ = (
        Index("ix_alias_moves_alias_id", "alias", "id"),
        {"comment": "History of aliases, append-only."},
    )


class PolicyRecord(Base):
    """Thresholds for a tenant and content type; a change is a new version, a trigger refuses UPDATE."""

    __tablename__ = "policies"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    tenant: Mapped[str] = mapped_column(Text, comment="Empty: every tenant.")
    content_type: Mapped[str] = mapped_column(Text, comment="Empty: every content type.")
    version: Mapped[int] = mapped_column(Integer, comment="From 1; the highest is in force.")
    head: Mapped[str | None] = mapped_column(Text, comment="Head to judge with, if the policy names one.")
    low: Mapped[float] = mapped_column(comment="Below this: real.")
    high: Mapped[float] = mapped_column(comment="From this on: fake.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it came into force.")
    created_by: Mapped[str] = mapped_column(Text, comment="Who set it.")
    note: Mapped[str] = mapped_column(Text, comment="Why.")
    evidence: Mapped[dict[str, Any] | None] = mapped_column(
        JSON_OBJECT, comment="Data and figures it was calibrated on, if it was."
    )
    # Not a foreign key: one may calibrate a directory that is never registered.
    release_id: Mapped[str | None] = mapped_column(
        Text,
        comment="Release that it was calibrated on; null: set by hand, or before this was kept.",
    )

    __table_args__ = (
        UniqueConstraint(tenant, content_type, version),
        CheckConstraint("low BETWEEN 0 AND 1 AND high BETWEEN 0 AND 1 AND low <= high", name="thresholds"),
        {"comment": "Thresholds per tenant and content type, versioned."},
    )
