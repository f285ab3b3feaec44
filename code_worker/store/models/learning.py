"""Tables of the learning loop: labels, images and their groups, snapshots, runs, schedule slots, shadow scores."""

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
    String,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from code_worker.store.ids import uuid7
from code_worker.store.models.base import BIG_KEY, JSON_OBJECT, PERSONAL, Base, UtcDateTime, db_now, partial_index

_RUNNING = "state = 'running'"


class LabelRow(Base):
    """A statement that an image is real or generated; a trigger refuses UPDATE, another statement is another row."""

    __tablename__ = "labels"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    fingerprint: Mapped[str] = mapped_column(
        String(64), comment="Of what makes it the same statement, so that a file imported twice adds nothing."
    )
    sha256: Mapped[str] = mapped_column(String(64), info=PERSONAL, comment="Of the image's bytes.")
    label: Mapped[str] = mapped_column(String(16), comment="real or fake.")
    generator: Mapped[str | None] = mapped_column(Text, comment="What made a fake one, if known.")
    collection: Mapped[str | None] = mapped_column(Text, comment="Where the image came from: a data set, a channel.")
    group: Mapped[str | None] = mapped_column(
        Text, info=PERSONAL, comment="Record or post that the image belongs to, if any."
    )
    by: Mapped[str] = mapped_column(Text, comment="Who says so.")
    source: Mapped[str] = mapped_column(Text, comment="By which way: api, cli, file:NAME.")
    uri: Mapped[str | None] = mapped_column(Text, info=PERSONAL, comment="Where the image was when it was labelled.")
    job_id: Mapped[str | None] = mapped_column(
        Uuid(as_uuid=False), info=PERSONAL, comment="Job it was labelled by, if any."
    )
    note: Mapped[str] = mapped_column(Text, info=PERSONAL, comment="Free text.")
    at: Mapped[datetime] = mapped_column(UtcDateTime, comment="When it was said.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was written here.")

    __table_args__ = (
        UniqueConstraint(fingerprint),
        CheckConstraint("label IN ('real', 'fake')", name="label"),
        CheckConstraint("label = 'fake' OR generator IS NULL", name="real_has_no_generator"),
        Index("ix_labels_sha256_id", "sha256", "id"),
        Index("ix_labels_created_at", "created_at"),
        partial_index("ix_labels_job_id", "job_id", where="job_id IS NOT NULL"),
        {"comment": "Statements about images, append-only; a stated rule resolves those that contradict."},
    )


class ImportedRow(Base):
    """A row of a label file, and the image it turned out to mean."""

    __tablename__ = "imported_rows"

    key: Mapped[str] = mapped_column(String(64), primary_key=True, comment="Of all that the row says.")
    sha256: Mapped[str] = mapped_column(String(64), info=PERSONAL, comment="Of the image's bytes.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was imported.")

    __table_args__ = (
        Index("ix_imported_rows_sha256", "sha256"),
        {"comment": "Rows of label files, so that none is fetched again."},
    )


class KeptImageRow(Base):
    """An image of which the dataset storage keeps a copy."""

    __tablename__ = "kept_images"

    sha256: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=PERSONAL, comment="Of the bytes, and the copy's name."
    )
    size_bytes: Mapped[int] = mapped_column(BigInteger, comment="Number of bytes.")
    format: Mapped[str | None] = mapped_column(String(16), comment="Image format by content.")
    width: Mapped[int | None] = mapped_column(Integer, comment="Pixels.")
    height: Mapped[int | None] = mapped_column(Integer, comment="Pixels.")
    uri: Mapped[str] = mapped_column(Text, info=PERSONAL, comment="Where it was read first.")
    phash: Mapped[str | None] = mapped_column(
        String(16),
        info=PERSONAL,
        comment="Perceptual hash in hexadecimal; null: not computed, or it cannot be decoded.",
    )
    band_0: Mapped[int | None] = mapped_column(Integer, comment="First 16 bits of the hash, for finding near ones.")
    band_1: Mapped[int | None] = mapped_column(Integer, comment="The next 16.")
    band_2: Mapped[int | None] = mapped_column(Integer, comment="The next 16.")
    band_3: Mapped[int | None] = mapped_column(Integer, comment="The last 16.")
    group_id: Mapped[str | None] = mapped_column(String(64), comment="Its group; null: nothing was said of it yet.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was kept.")

    __table_args__ = (
        *(Index(f"ix_kept_images_band_{band}", f"band_{band}") for band in range(4)),
        Index("ix_kept_images_phash_group_id", "phash", "group_id"),
        Index("ix_kept_images_group_id_sha256", "group_id", "sha256"),
        Index("ix_kept_images_created_at", "created_at"),
        {"comment": "Copies in the dataset storage; source objects vanish."},
    )


class ImageGroupRow(Base):
    """Images that are always in the same part of the labelled ones; a trigger refuses UPDATE."""

    __tablename__ = "image_groups"

    id: Mapped[str] = mapped_column(String(64), primary_key=True, comment="HMAC-SHA256 of what it was made for.")
    joins: Mapped[str | None] = mapped_column(String(64), comment="Group that this name stands for.")
    split: Mapped[str] = mapped_column(String(16), comment="train, validation, holdout, or none: left out of all.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was decided.")

    __table_args__ = (
        CheckConstraint("split IN ('train', 'validation', 'holdout', 'none')", name="split"),
        Index("ix_image_groups_joins", "joins"),
        {"comment": "Which images are learned from, and which are only measured on."},
    )


class SecretRow(Base):
    """A secret of this installation, made once; a trigger refuses UPDATE."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(Text, primary_key=True, comment="What it is for.")
    value: Mapped[bytes] = mapped_column(LargeBinary, comment="Random bytes; never shown.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was made.")

    __table_args__ = ({"comment": "Secrets of this installation, such as the one that decides the hold-out."},)


class SnapshotRow(Base):
    """The frozen list of labelled images that one run used."""

    __tablename__ = "snapshots"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    digest: Mapped[str] = mapped_column(String(64), comment="Of the members; equal digests are equal snapshots.")
    rule: Mapped[str] = mapped_column(Text, comment="How contradicting labels were resolved.")
    counts: Mapped[dict[str, Any]] = mapped_column(JSON_OBJECT, comment="Members by split, label and generator.")
    members: Mapped[bytes] = mapped_column(
        LargeBinary, info=PERSONAL, comment="zlib of JSON lines, sorted by content hash."
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was taken.")

    __table_args__ = ({"comment": "What a run was trained and measured on."},)


class RunRow(Base):
    """One retrain or refit, from its start to promotion, rejection or failure."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    kind: Mapped[str] = mapped_column(String(16), comment="retrain or refit.")
    state: Mapped[str] = mapped_column(String(16), comment="running, promoted, rejected, failed or skipped.")
    stage: Mapped[str] = mapped_column(Text, comment="What it does now, or did last.")
    by: Mapped[str] = mapped_column(Text, comment="Who started it; the schedule's name and slot if nobody did.")
    attempts: Mapped[int] = mapped_column(Integer, comment="Processes that worked on it.")
    owner: Mapped[str | None] = mapped_column(Text, comment="Process that works on it now.")
    token: Mapped[int] = mapped_column(Integer, comment="Fencing token: one more for every process that takes it.")
    config: Mapped[dict[str, Any]] = mapped_column(JSON_OBJECT, comment="Training settings when it began.")
    snapshot_id: Mapped[str | None] = mapped_column(ForeignKey("snapshots.id"), comment="What it learned from.")
    base_release: Mapped[str | None] = mapped_column(Text, comment="Champion when it began.")
    candidate: Mapped[str | None] = mapped_column(Text, comment="Release it made, if it came so far.")
    reasons: Mapped[list[str]] = mapped_column(JSON_OBJECT, info=PERSONAL, comment="Why it ended as it did.")
    report: Mapped[dict[str, Any]] = mapped_column(JSON_OBJECT, info=PERSONAL, comment="Gate and evaluation.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was started.")
    heartbeat_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="Last sign of life.")
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime, comment="When it ended.")

    __table_args__ = (
        CheckConstraint("kind IN ('retrain', 'refit')", name="kind"),
        CheckConstraint("state IN ('running', 'promoted', 'rejected', 'failed', 'skipped')", name="state"),
        CheckConstraint("(state = 'running') = (finished_at IS NULL)", name="finished"),
        # One at a time in the whole deployment.
        Index("uq_runs_running", "state", unique=True, postgresql_where=text(_RUNNING), sqlite_where=text(_RUNNING)),
        Index("ix_runs_created_at", "created_at"),
        {"comment": "Retrains and refits."},
    )


class GateComparisonRow(Base):
    """A candidate that was compared with a champion on the hold-out, and the chance of error that it was allowed."""

    __tablename__ = "gate_comparisons"

    run_id: Mapped[str] = mapped_column(Uuid(as_uuid=False), ForeignKey("runs.id"), primary_key=True, comment="Run.")
    champion: Mapped[str] = mapped_column(Text, primary_key=True, comment="Release that the candidate met.")
    candidate: Mapped[str] = mapped_column(Text, comment="Release that wanted its place.")
    images: Mapped[int] = mapped_column(Integer, comment="Of the hold-out.")
    level: Mapped[float] = mapped_column(comment="Chance that an equal release passes.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When.")

    __table_args__ = (
        Index("ix_gate_comparisons_champion_created_at", "champion", "created_at"),
        {"comment": "What was spent of each champion's chance to be replaced by luck."},
    )


class RunMetricsRow(Base):
    """The figures of a run at one moment."""

    __tablename__ = "run_metrics"

    id: Mapped[int] = mapped_column(BIG_KEY, primary_key=True, autoincrement=True, comment="Order.")
    run_id: Mapped[str] = mapped_column(Uuid(as_uuid=False), ForeignKey("runs.id"), comment="The run.")
    epoch: Mapped[int] = mapped_column(Integer, comment="From 1.")
    step: Mapped[int] = mapped_column(Integer, comment="Optimiser steps done.")
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON_OBJECT, comment="Name to number.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When.")

    __table_args__ = (
        # A resumed run measures a step again; the same step is the same row.
        UniqueConstraint(run_id, step),
        {"comment": "Curves of training runs."},
    )


class ScheduleSlotRow(Base):
    """One time at which a schedule was due; unique, so that two schedulers fire it once."""

    __tablename__ = "schedule_slots"

    name: Mapped[str] = mapped_column(Text, primary_key=True, comment="Schedule, such as retrain.")
    slot: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True, comment="When it was due.")
    run_id: Mapped[str | None] = mapped_column(Uuid(as_uuid=False), comment="Run that it started, if any.")
    outcome: Mapped[str] = mapped_column(Text, comment="started, resumed, or why not.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When it was taken.")

    __table_args__ = ({"comment": "Times at which schedules fired."},)


class ShadowScoreRow(Base):
    """A challenger's score of an image that the champion judged; it never acts."""

    __tablename__ = "shadow_scores"

    id: Mapped[str] = mapped_column(Uuid(as_uuid=False), primary_key=True, default=uuid7, comment="UUIDv7.")
    job_id: Mapped[str] = mapped_column(Uuid(as_uuid=False), info=PERSONAL, comment="The job.")
    revision: Mapped[int] = mapped_column(Integer, comment="Of the champion's verdict.")
    sha256: Mapped[str] = mapped_column(String(64), info=PERSONAL, comment="Of the bytes that were judged.")
    release: Mapped[str] = mapped_column(Text, comment="The challenger.")
    head: Mapped[str] = mapped_column(Text, comment="Its head.")
    score: Mapped[float] = mapped_column(comment="0 to 1, higher = more likely generated.")
    label: Mapped[str] = mapped_column(String(16), comment="What it would have said.")
    champion: Mapped[str] = mapped_column(Text, comment="Release that judged.")
    champion_head: Mapped[str] = mapped_column(Text, comment="Its head.")
    champion_score: Mapped[float] = mapped_column(comment="Its score.")
    champion_label: Mapped[str] = mapped_column(String(16), comment="Its label.")
    tenant: Mapped[str | None] = mapped_column(Text, info=PERSONAL, comment="The job's.")
    content_type: Mapped[str | None] = mapped_column(Text, comment="The job's.")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), comment="When.")

    __table_args__ = (
        UniqueConstraint(job_id, revision, release),
        Index("ix_shadow_scores_release_id", "release", "id"),
        {"comment": "Challenger beside champion on live traffic."},
    )
