"""Tables of erasure: receipts that outlast what they are about, and what is still to be erased."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, String, Text, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from code_worker.store.ids import uuid7
from code_worker.store.models.base import JSON_OBJECT, Base, UtcDateTime, db_now

__all__ = ["ErasedDigestRow", "ErasureRow", "ErasureTargetRow"]


class ErasureRow(Base):
    """One erasure and its receipt; names nothing of what it erased."""

    __tablename__ = "erasures"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    state: Mapped[str] = mapped_column(String(16), comment="running or done.")
    scope: Mapped[str] = mapped_column(Text, comment="job, sha256, tenant, or before and the day.")
    by: Mapped[str] = mapped_column(Text, comment="Who asked for it.")
    why: Mapped[str] = mapped_column(Text, comment="Why.")
    salt: Mapped[str] = mapped_column(String(64), comment="Of the digests that say what was erased.")
    counts: Mapped[dict[str, Any]] = mapped_column(JSON_OBJECT, comment="What was erased, by kind.")
    releases: Mapped[dict[str, Any]] = mapped_column(
        JSON_OBJECT, comment="Releases that learned from it, directly or by descent, and what became of their files."
    )
    runs: Mapped[list[str]] = mapped_column(JSON_OBJECT, comment="Runs whose directories must go, on every machine.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was begun.")
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime, comment="When nothing was left.")

    __table_args__ = (
        CheckConstraint("state IN ('running', 'done')", name="state"),
        CheckConstraint("(state = 'done') = (finished_at IS NOT NULL)", name="finished"),
        {"comment": "Receipts of erasures."},
    )


class ErasureTargetRow(Base):
    """Something that an erasure under way must erase; gone when it is done."""

    __tablename__ = "erasure_targets"

    erasure_id: Mapped[str] = mapped_column(
        Uuid(as_uuid=False), ForeignKey("erasures.id"), primary_key=True, comment="The erasure."
    )
    kind: Mapped[str] = mapped_column(String(8), primary_key=True, comment="job or image.")
    value: Mapped[str] = mapped_column(String(64), primary_key=True, comment="The job's id, or the content hash.")

    __table_args__ = ({"comment": "What an erasure under way must erase, so that a crash loses none of it."},)


class ErasedDigestRow(Base):
    """Salted digest of something that was erased: whoever has the original can ask, nobody can read it back."""

    __tablename__ = "erased_digests"

    erasure_id: Mapped[str] = mapped_column(
        Uuid(as_uuid=False), ForeignKey("erasures.id"), primary_key=True, comment="The erasure."
    )
    digest: Mapped[str] = mapped_column(
        String(64), primary_key=True, comment="HMAC-SHA256 of kind and value under the erasure's salt."
    )

    __table_args__ = ({"comment": "What was erased, as nobody can read it back."},)
