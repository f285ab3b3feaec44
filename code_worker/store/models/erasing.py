"""Tables of erasure: receipts that outlast what they are about, and what is still to be erased."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, CheckConstraint, ForeignKey, Index, String, Text, Uuid, false
from sqlalchemy.orm import Mapped, mapped_column

from code_worker.store.ids import uuid7
from code_worker.store.models.base import JSON_OBJECT, PERSONAL, Base, UtcDateTime, db_now, partial_index

__all__ = ["CopyToDropRow", "ErasedDigestRow", "ErasureRow", "ErasureTargetRow", "ImageOriginRow"]


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
    """Salted digest of something that was erased: whoever has the original can ask, nobody can read it back."""

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
