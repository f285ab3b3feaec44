"""Tables of the main job: jobs, verdicts, embeddings, and what judges: releases, aliases, policies."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Text,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.orm import Mapped, mapped_column

from code_worker.store.ids import uuid7
from code_worker.store.models.base import BIG_KEY, JSON_OBJECT, PERSONAL, Base, UtcDateTime, db_now, partial_index
from code_worker.types import EMBEDDING_DIM


class JobRow(Base):
    """One request to judge one image, from acceptance to its verdict. Unfinished ⇔ `due_at` is set."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(
        Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7, or UUIDv5 of tenant and key."
    )
    key: Mapped[str | None] = mapped_column(Text, info=PERSONAL, comment="The caller's idempotency key.")
    payload_sha256: Mapped[str | None] = mapped_column(
        String(64),
        info=PERSONAL,
        comment="Of the fields asked for; only with a key, to tell a repeat from a conflict.",
    )
    uri: Mapped[str] = mapped_column(Text, info=PERSONAL, comment="Where the image is.")
    head: Mapped[str | None] = mapped_column(Text, comment="Head asked for, if any.")
    tenant: Mapped[str | None] = mapped_column(Text, info=PERSONAL, comment="On whose behalf.")
    content_type: Mapped[str | None] = mapped_column(Text, comment="Kind of content, for the policy.")
    priority: Mapped[int] = mapped_column(SmallInteger, comment="0 (backfill) to 9 (live).")
    queue: Mapped[str] = mapped_column(Text, comment="Broker queue that the priority chose.")
    metadata_: Mapped[dict[str, Any]] = mapped_column(
        "metadata", JSON_OBJECT, info=PERSONAL, comment="The caller's own object."
    )
    state: Mapped[str] = mapped_column(String(16), default="accepted", comment="See the check constraint.")
    attempts: Mapped[int] = mapped_column(
        Integer, default=0, comment="Claims that have not ended in order: the present one and those of dead workers."
    )
    faults: Mapped[int] = mapped_column(Integer, default=0, comment="Transient faults that a worker reported.")
    revision: Mapped[int] = mapped_column(Integer, default=0, comment="Number of the next verdict; +1 per retry.")
    owner: Mapped[str | None] = mapped_column(Text, comment="Worker process that holds the claim.")
    due_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, comment="When the sweeper must look: end of the lease or of the wait; null once finished."
    )
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime, comment="No claim before this.")
    published_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, comment="Last time a message for it was published."
    )
    claimed_at: Mapped[datetime | None] = mapped_column(UtcDateTime, comment="Last claim.")
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime, comment="When the verdict was written.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was accepted.")
    retried_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, comment="When it was last accepted again; null: never."
    )
    last_fault: Mapped[str | None] = mapped_column(
        Text, info=PERSONAL, comment="Reason and detail of the last transient fault."
    )

    __table_args__ = (
        CheckConstraint("state IN ('accepted', 'running', 'done', 'quarantined')", name="state"),
        CheckConstraint("(state IN ('accepted', 'running')) = (due_at IS NOT NULL)", name="unfinished_is_due"),
        CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
        # These hold unfinished jobs only, so that the sweeper's cost does not grow with history.
        partial_index("ix_jobs_due_at", "due_at", where="due_at IS NOT NULL"),
        partial_index("ix_jobs_queue_published_at", "queue", "published_at", where="due_at IS NOT NULL"),
        partial_index("ix_jobs_owner", "owner", where="owner IS NOT NULL"),
        partial_index("ix_jobs_queue_claimed_at", "queue", "claimed_at", where="claimed_at IS NOT NULL"),
        Index("ix_jobs_created_at_id", "created_at", "id"),
        Index("ix_jobs_state_created_at_id", "state", "created_at", "id"),
        partial_index("ix_jobs_tenant_created_at_id", "tenant", "created_at", "id", where="tenant IS NOT NULL"),
        {"comment": "Requests to judge one image; the truth about what is still to do."},
    )


class VerdictRow(Base):
    """The answer to one job; a trigger refuses UPDATE. The live one of a job has the highest revision."""

    __tablename__ = "verdicts"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    job_id: Mapped[str] = mapped_column(
        Uuid(as_uuid=False), ForeignKey("jobs.id"), info=PERSONAL, comment="The job it answers."
    )
    revision: Mapped[int] = mapped_column(Integer, comment="0 for the first, one more for each retry of the job.")
    outcome: Mapped[str] = mapped_column(String(16), comment="judged or rejected.")
    label: Mapped[str | None] = mapped_column(String(16), comment="real, fake or uncertain; of judged ones.")
    score: Mapped[float | None] = mapped_column(comment="0 to 1, higher = more likely generated; of judged ones.")
    reason: Mapped[str | None] = mapped_column(String(32), comment="Why there is no label; of rejected ones.")
    detail: Mapped[str] = mapped_column(Text, info=PERSONAL, comment="What exactly was wrong, for people.")
    uri: Mapped[str] = mapped_column(Text, info=PERSONAL, comment="Where the image was read.")
    sha256: Mapped[str | None] = mapped_column(String(64), info=PERSONAL, comment="Of the bytes that were judged.")
    size_bytes: Mapped[int | None] = mapped_column(BigInteger, comment="Number of those bytes.")
    format: Mapped[str | None] = mapped_column(String(16), comment="Image format by content.")
    width: Mapped[int | None] = mapped_column(Integer, comment="Pixels.")
    height: Mapped[int | None] = mapped_column(Integer, comment="Pixels.")
    mode: Mapped[str | None] = mapped_column(String(16), comment="Colour mode before conversion.")
    etag: Mapped[str | None] = mapped_column(Text, info=PERSONAL, comment="The source's entity tag.")
    version_id: Mapped[str | None] = mapped_column(Text, info=PERSONAL, comment="The source's version of the object.")
    release: Mapped[str | None] = mapped_column(Text, comment="Release that judged; the row outlives it.")
    manifest_sha256: Mapped[str | None] = mapped_column(String(64), comment="Of that release's manifest.")
    head: Mapped[str | None] = mapped_column(Text, comment="Head that scored.")
    head_sha256: Mapped[str | None] = mapped_column(String(64), comment="Of that head's files.")
    head_plugin: Mapped[str | None] = mapped_column(
        Text, comment="Distribution and version of the plugin that scored; null: it is not known."
    )
    policy: Mapped[str | None] = mapped_column(Text, comment="Policy that turned the score into a label.")
    low: Mapped[float | None] = mapped_column(comment="Below this: real.")
    high: Mapped[float | None] = mapped_column(comment="From this on: fake.")
    code_version: Mapped[str | None] = mapped_column(String(64), comment="Version of the code that judged.")
    tenant: Mapped[str | None] = mapped_column(Text, info=PERSONAL, comment="The job's.")
    content_type: Mapped[str | None] = mapped_column(Text, comment="The job's.")
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSON_OBJECT, info=PERSONAL, comment="The job's.")
    timings_ms: Mapped[dict[str, float]] = mapped_column(JSON_OBJECT, comment="Milliseconds by stage.")
    supersedes: Mapped[str | None] = mapped_column(
        Uuid(as_uuid=False), comment="Verdict that this one judges again; that one stays."
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was written.")

    __table_args__ = (
        UniqueConstraint(job_id, revision),
        CheckConstraint("outcome IN ('judged', 'rejected')", name="outcome"),
        CheckConstraint(
            "(outcome = 'judged') = (label IS NOT NULL) AND (outcome = 'judged') = (score IS NOT NULL)",
            name="judged_has_label_and_score",
        ),
        CheckConstraint("(outcome = 'rejected') = (reason IS NOT NULL)", name="rejected_has_reason"),
        CheckConstraint("label IN ('real', 'fake', 'uncertain')", name="label"),
        CheckConstraint("score BETWEEN 0 AND 1", name="score"),
        Index("ix_verdicts_created_at", "created_at"),
        # A verdict has either a label or a reason, so these two cost one entry together.
        partial_index("ix_verdicts_label_id", "label", "id", where="label IS NOT NULL"),
        partial_index("ix_verdicts_reason_id", "reason", "id", where="reason IS NOT NULL"),
        partial_index("ix_verdicts_sha256_id", "sha256", "id", where="sha256 IS NOT NULL"),
        partial_index("ix_verdicts_tenant_id", "tenant", "id", where="tenant IS NOT NULL"),
        partial_index("ix_verdicts_release_id", "release", "id", where="release IS NOT NULL"),
        {"comment": "Immutable answers; UPDATE is refused, DELETE belongs to retention."},
    )


class EmbeddingRow(Base):
    """An embedding of some bytes, kept so that equal bytes are not encoded twice."""

    __tablename__ = "embeddings"

    encoder_sha256: Mapped[str] = mapped_column(String(64), primary_key=True, comment="Of the encoder's weights.")
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True, info=PERSONAL, comment="Of the image's bytes.")
    vector: Mapped[bytes] = mapped_column(LargeBinary, info=PERSONAL, comment="192 float32, little-endian.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was computed.")

    __table_args__ = (
        CheckConstraint(f"length(vector) = {EMBEDDING_DIM * 4}", name="vector_length"),
        Index("ix_embeddings_created_at", "created_at"),
        {"comment": "Embeddings by encoder and content."},
    )


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
        comment="Release that it was calibrated on; null: set by hand.",
    )

    __table_args__ = (
        UniqueConstraint(tenant, content_type, version),
        CheckConstraint("low BETWEEN 0 AND 1 AND high BETWEEN 0 AND 1 AND low <= high", name="thresholds"),
        {"comment": "Thresholds per tenant and content type, versioned."},
    )
