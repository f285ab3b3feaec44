"""The learning loop: labels, kept images, snapshots, runs, schedule slots, shadow scores, rescored verdicts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_24_learning"
down_revision = "2026_11_22_initial"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON_OBJECT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
IMMUTABLE = ("labels", "snapshots")


def upgrade() -> None:
    create_labels()
    create_imported_rows()
    create_kept_images()
    create_snapshots()
    create_runs()
    create_run_metrics()
    create_schedule_slots()
    create_shadow_scores()
    op.add_column(
        "policies",
        sa.Column(
            "evidence", JSON_OBJECT, nullable=True, comment="Data and figures it was calibrated on, if it was."
        ),
    )
    op.add_column(
        "verdicts",
        sa.Column(
            "supersedes",
            sa.Uuid(as_uuid=False),
            nullable=True,
            comment="Verdict that this one judges again; that one stays.",
        ),
    )
    refuse_updates()


def downgrade() -> None:
    op.drop_column("verdicts", "supersedes")
    op.drop_column("policies", "evidence")
    for table in ("shadow_scores", "schedule_slots", "run_metrics", "runs", "snapshots"):
        op.drop_table(table)
    for table in ("kept_images", "imported_rows", "labels"):
        op.drop_table(table)


def refuse_updates() -> None:
    """Who said what of which image, and what a release learned from, cannot be changed afterwards."""
    for table in IMMUTABLE:
        if op.get_context().dialect.name == "postgresql":
            op.execute(
                f"CREATE TRIGGER {table}_immutable BEFORE UPDATE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION code_worker_refuse_update()"
            )
        else:
            op.execute(
                f"CREATE TRIGGER {table}_immutable BEFORE UPDATE ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} are immutable'); END"
            )


def create_labels() -> None:
    op.create_table(
        "labels",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7."),
        sa.Column(
            "fingerprint",
            sa.String(length=64),
            nullable=False,
            comment="Of what makes it the same statement, so that a file imported twice adds nothing.",
        ),
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="Of the image's bytes."),
        sa.Column("label", sa.String(length=16), nullable=False, comment="real or fake."),
        sa.Column("generator", sa.Text(), nullable=True, comment="What made a fake one, if known."),
        sa.Column(
            "collection", sa.Text(), nullable=True, comment="Where the image came from: a data set, a channel."
        ),
        sa.Column("by", sa.Text(), nullable=False, comment="Who says so."),
        sa.Column("source", sa.Text(), nullable=False, comment="By which way: api, cli, file:NAME."),
        sa.Column("uri", sa.Text(), nullable=True, comment="Where the image was when it was labelled."),
        sa.Column("job_id", sa.Uuid(as_uuid=False), nullable=True, comment="Job it was labelled by, if any."),
        sa.Column("note", sa.Text(), nullable=False, comment="Free text."),
        sa.Column("at", TIME, nullable=False, comment="When it was said."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was written here."),
        sa.CheckConstraint("label = 'fake' OR generator IS NULL", name=op.f("ck_labels_real_has_no_generator")),
        sa.CheckConstraint("label IN ('real', 'fake')", name=op.f("ck_labels_label")),
        sa.PrimaryKeyConstraint("id", name="pk_labels"),
        sa.UniqueConstraint("fingerprint", name="uq_labels_fingerprint"),
        comment="Statements about images, append-only; a stated rule resolves those that contradict.",
    )
    op.create_index("ix_labels_created_at", "labels", ["created_at"])
    op.create_index("ix_labels_sha256_id", "labels", ["sha256", "id"])


def create_imported_rows() -> None:
    op.create_table(
        "imported_rows",
        sa.Column("key", sa.String(length=64), nullable=False, comment="Of all that the row says."),
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="Of the image's bytes."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was imported."),
        sa.PrimaryKeyConstraint("key", name="pk_imported_rows"),
        comment="Rows of label files, so that none is fetched again.",
    )


def create_kept_images() -> None:
    op.create_table(
        "kept_images",
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="Of the bytes, and the copy's name."),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False, comment="Number of bytes."),
        sa.Column("format", sa.String(length=16), nullable=True, comment="Image format by content."),
        sa.Column("width", sa.Integer(), nullable=True, comment="Pixels."),
        sa.Column("height", sa.Integer(), nullable=True, comment="Pixels."),
        sa.Column("uri", sa.Text(), nullable=False, comment="Where it was read first."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was kept."),
        sa.PrimaryKeyConstraint("sha256", name="pk_kept_images"),
        comment="Copies in the dataset storage; source objects vanish.",
    )


def create_snapshots() -> None:
    op.create_table(
        "snapshots",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7."),
        sa.Column(
            "digest",
            sa.String(length=64),
            nullable=False,
            comment="Of the members; equal digests are equal snapshots.",
        ),
        sa.Column("rule", sa.Text(), nullable=False, comment="How contradicting labels were resolved."),
        sa.Column("counts", JSON_OBJECT, nullable=False, comment="Members by split, label and generator."),
        sa.Column("members", sa.LargeBinary(), nullable=False, comment="zlib of JSON lines, sorted by content hash."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was taken."),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
        comment="What a run was trained and measured on.",
    )


def create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7."),
        sa.Column("kind", sa.String(length=16), nullable=False, comment="retrain or refit."),
        sa.Column(
            "state", sa.String(length=16), nullable=False, comment="running, promoted, rejected, failed or skipped."
        ),
        sa.Column("stage", sa.Text(), nullable=False, comment="What it does now, or did last."),
        sa.Column(
            "by", sa.Text(), nullable=False, comment="Who started it; the schedule's name and slot if nobody did."
        ),
        sa.Column("attempts", sa.Integer(), nullable=False, comment="Processes that worked on it."),
        sa.Column("owner", sa.Text(), nullable=True, comment="Process that works on it now."),
        sa.Column(
            "token", sa.Integer(), nullable=False, comment="Fencing token: one more for every process that takes it."
        ),
        sa.Column("config", JSON_OBJECT, nullable=False, comment="Training settings when it began."),
        sa.Column("snapshot_id", sa.Uuid(as_uuid=False), nullable=True, comment="What it learned from."),
        sa.Column("base_release", sa.Text(), nullable=True, comment="Champion when it began."),
        sa.Column("candidate", sa.Text(), nullable=True, comment="Release it made, if it came so far."),
        sa.Column("reasons", JSON_OBJECT, nullable=False, comment="Why it ended as it did."),
        sa.Column("report", JSON_OBJECT, nullable=False, comment="Gate and evaluation."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was started."),
        sa.Column("heartbeat_at", TIME, nullable=False, comment="Last sign of life."),
        sa.Column("finished_at", TIME, nullable=True, comment="When it ended."),
        sa.CheckConstraint("(state = 'running') = (finished_at IS NULL)", name=op.f("ck_runs_finished")),
        sa.CheckConstraint("kind IN ('retrain', 'refit')", name=op.f("ck_runs_kind")),
        sa.CheckConstraint(
            "state IN ('running', 'promoted', 'rejected', 'failed', 'skipped')", name=op.f("ck_runs_state")
        ),
        sa.ForeignKeyConstraint(["snapshot_id"], ["snapshots.id"], name="fk_runs_snapshot_id"),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        comment="Retrains and refits.",
    )
    op.create_index("ix_runs_created_at", "runs", ["created_at"])
    op.create_index(
        "uq_runs_running",
        "runs",
        ["state"],
        unique=True,
        postgresql_where=sa.text("state = 'running'"),
        sqlite_where=sa.text("state = 'running'"),
    )


def create_run_metrics() -> None:
    op.create_table(
        "run_metrics",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False, comment="Order."),
        sa.Column("run_id", sa.Uuid(as_uuid=False), nullable=False, comment="The run."),
        sa.Column("epoch", sa.Integer(), nullable=False, comment="From 1."),
        sa.Column("step", sa.Integer(), nullable=False, comment="Optimiser steps done."),
        sa.Column("metrics", JSON_OBJECT, nullable=False, comment="Name to number."),
        sa.Column("created_at", TIME, nullable=False, comment="When."),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_run_metrics_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_run_metrics"),
        sa.UniqueConstraint("run_id", "step", name="uq_run_metrics_run_id_step"),
        comment="Curves of training runs.",
    )


def create_schedule_slots() -> None:
    op.create_table(
        "schedule_slots",
        sa.Column("name", sa.Text(), nullable=False, comment="Schedule, such as retrain."),
        sa.Column("slot", TIME, nullable=False, comment="When it was due."),
        sa.Column("run_id", sa.Uuid(as_uuid=False), nullable=True, comment="Run that it started, if any."),
        sa.Column("outcome", sa.Text(), nullable=False, comment="started, resumed, or why not."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was taken."),
        sa.PrimaryKeyConstraint("name", "slot", name="pk_schedule_slots"),
        comment="Times at which schedules fired.",
    )


def create_shadow_scores() -> None:
    op.create_table(
        "shadow_scores",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7."),
        sa.Column("job_id", sa.Uuid(as_uuid=False), nullable=False, comment="The job."),
        sa.Column("revision", sa.Integer(), nullable=False, comment="Of the champion's verdict."),
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="Of the bytes that were judged."),
        sa.Column("release", sa.Text(), nullable=False, comment="The challenger."),
        sa.Column("head", sa.Text(), nullable=False, comment="Its head."),
        sa.Column("score", sa.Double(), nullable=False, comment="0 to 1, higher = more likely generated."),
        sa.Column("label", sa.String(length=16), nullable=False, comment="What it would have said."),
        sa.Column("champion", sa.Text(), nullable=False, comment="Release that judged."),
        sa.Column("champion_head", sa.Text(), nullable=False, comment="Its head."),
        sa.Column("champion_score", sa.Double(), nullable=False, comment="Its score."),
        sa.Column("champion_label", sa.String(length=16), nullable=False, comment="Its label."),
        sa.Column("tenant", sa.Text(), nullable=True, comment="The job's."),
        sa.Column("content_type", sa.Text(), nullable=True, comment="The job's."),
        sa.Column("created_at", TIME, nullable=False, comment="When."),
        sa.PrimaryKeyConstraint("id", name="pk_shadow_scores"),
        sa.UniqueConstraint("job_id", "revision", "release", name="uq_shadow_scores_job_id_revision_release"),
        comment="Challenger beside champion on live traffic.",
    )
    op.create_index("ix_shadow_scores_release_id", "shadow_scores", ["release", "id"])
