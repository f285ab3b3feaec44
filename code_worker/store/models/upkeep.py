"""Tables of the running system: audit, erasure, workers, leases, paused sources, dead letters, plugins."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    Uuid,
    false,
)
from sqlalchemy.orm import Mapped, mapped_column

from code_worker.store.ids import uuid7
from code_worker.store.models.base import BIG_KEY, JSON_OBJECT, PERSONAL, Base, UtcDateTime, db_now, partial_index


class AuditRow(Base):
    """An entry of the audit; triggers refuse UPDATE and DELETE, and nothing ever removes a row."""

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


class ErasureRow(Base):
    """One erasure and its receipt; names nothing of what it erased."""

    __tablename__ = "erasures"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    state: Mapped[str] = mapped_column(String(16), comment="running or done.")
    scope: Mapped[str] = mapped_column(Text, comment="job, sha256, tenant, or before and the day.")
    by: Mapped[str] = mapped_column(Text, comment="Who asked for it.")
    why: Mapped[str] = mapped_column(Text, comment="Why.")
    target: Mapped[dict[str, str] | None] = mapped_column(
        JSON_OBJECT, info=PERSONAL, comment="The scope with what it names; null once finished."
    )
    step: Mapped[str] = mapped_column(Text, default="jobs", server_default="jobs", comment="What is erased now.")
    salt: Mapped[str] = mapped_column(String(64), comment="Of the digests that say what was erased.")
    counts: Mapped[dict[str, Any]] = mapped_column(JSON_OBJECT, comment="What was erased, by kind.")
    releases: Mapped[dict[str, Any]] = mapped_column(
        JSON_OBJECT, comment="Releases that learned from it, directly or by descent, and what became of their files."
    )
    runs: Mapped[list[str]] = mapped_column(JSON_OBJECT, comment="Runs whose directories must go, on every machine.")
    learned: Mapped[bool] = mapped_column(
        Boolean, default=False, server_default=false(), comment="Whether it names runs or releases."
    )
    last_look: Mapped[dict[str, int] | None] = mapped_column(
        JSON_OBJECT, comment="What the look over all tables and the storage found at the end."
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was begun.")
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime, comment="When nothing was left.")

    __table_args__ = (
        CheckConstraint("state IN ('running', 'done')", name="state"),
        CheckConstraint("(state = 'done') = (finished_at IS NOT NULL)", name="finished"),
        # Neither a writer's question nor a pass of retention costs more for every receipt that there ever was.
        Index("ix_erasures_finished_at", "finished_at"),
        partial_index("ix_erasures_running", "id", where="state = 'running'"),
        partial_index("ix_erasures_learned", "id", where="learned"),
        {"comment": "Receipts of erasures."},
    )


class ErasureTargetRow(Base):
    """Something that an erasure under way must erase; gone when it is done."""

    __tablename__ = "erasure_targets"

    erasure_id: Mapped[str] = mapped_column(
        Uuid(as_uuid=False), ForeignKey("erasures.id"), primary_key=True, comment="The erasure."
    )
    kind: Mapped[str] = mapped_column(
        String(8), primary_key=True, comment="job, image, erased (an image whose rows are gone) or uri."
    )
    value: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=PERSONAL, comment="Job's id, content hash, or digest of an address."
    )

    __table_args__ = ({"comment": "What an erasure under way must erase, so that a crash loses none of it."},)


class ErasedDigestRow(Base):
    """Salted digest of something that was erased: anyone who has the original can ask, nobody can read it back."""

    __tablename__ = "erased_digests"

    erasure_id: Mapped[str] = mapped_column(
        Uuid(as_uuid=False), ForeignKey("erasures.id"), primary_key=True, comment="The erasure."
    )
    digest: Mapped[str] = mapped_column(
        String(64), primary_key=True, comment="HMAC-SHA256 of kind and value under the erasure's salt."
    )

    __table_args__ = ({"comment": "What was erased, as nobody can read it back."},)


class ImageOriginRow(Base):
    """A job that is gone while something of its image is kept: it leads from the tenant to what is left."""

    __tablename__ = "image_origins"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True, info=PERSONAL, comment="Of the image's bytes.")
    job_id: Mapped[str] = mapped_column(
        Uuid(as_uuid=False), primary_key=True, info=PERSONAL, comment="The job that judged it."
    )
    tenant: Mapped[str | None] = mapped_column(Text, info=PERSONAL, comment="The job's.")
    accepted_at: Mapped[datetime] = mapped_column(UtcDateTime, comment="When the job was accepted.")

    __table_args__ = (
        Index("ix_image_origins_job_id", "job_id"),
        Index("ix_image_origins_accepted_at", "accepted_at"),
        partial_index("ix_image_origins_tenant", "tenant", where="tenant IS NOT NULL"),
        {"comment": "Whose image it was, once retention took the job and while something of the image is kept."},
    )


class CopyToDropRow(Base):
    """A kept copy whose row is gone; its file goes next, and until then nobody keeps it anew."""

    __tablename__ = "copies_to_drop"

    sha256: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=PERSONAL, comment="Of the bytes, and the copy's name."
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When its row went.")

    __table_args__ = ({"comment": "Copies in the dataset storage that are about to be deleted."},)


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
