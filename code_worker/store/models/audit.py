"""Tables of the audit: the chain of entries, and the leave to remove rows that one entry gives."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from code_worker.store.models.base import BIG_KEY, Base, UtcDateTime

__all__ = ["AuditRow", "RemovalRow"]


class AuditRow(Base):
    """Who changed what; triggers refuse UPDATE and DELETE, and nothing ever removes a row."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(BIG_KEY, primary_key=True, autoincrement=False, comment="From 1, without gaps.")
    at: Mapped[datetime] = mapped_column(UtcDateTime, comment="When, by the database's clock.")
    actor: Mapped[str] = mapped_column(Text, comment="Who did it.")
    action: Mapped[str] = mapped_column(Text, comment="What was done: release.promote, label.add, …")
    subject: Mapped[str] = mapped_column(Text, comment="To what: an id or a name, never a content hash.")
    details: Mapped[str] = mapped_column(Text, comment="JSON object, byte for byte as it was hashed.")
    previous: Mapped[str] = mapped_column(String(64), comment="Hash of the entry before.")
    hash: Mapped[str] = mapped_column(String(64), comment="sha256 of all the other columns.")

    __table_args__ = (
        CheckConstraint("seq >= 1", name="seq"),
        # Two entries after the same one would be two histories.
        UniqueConstraint(previous),
        Index("ix_audit_subject_seq", "subject", "seq"),
        {"comment": "Who changed what, append-only; each entry holds the hash of the one before."},
    )


class RemovalRow(Base):
    """Leave to remove rows of record, for the rest of one transaction; a row that is left makes its commit fail."""

    __tablename__ = "removals"

    audit_seq: Mapped[int] = mapped_column(
        BIG_KEY, ForeignKey("audit.seq"), primary_key=True, autoincrement=False, comment="The entry that says why."
    )
    closed: Mapped[int] = mapped_column(
        BIG_KEY,
        ForeignKey("removals.audit_seq", deferrable=True, initially="DEFERRED"),
        comment="Points nowhere, so that this row cannot be committed.",
    )

    __table_args__ = (
        CheckConstraint("closed = -audit_seq", name="closed"),
        {"comment": "Never has rows outside a transaction: while one is there, tables of record may lose rows."},
    )
