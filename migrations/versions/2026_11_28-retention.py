"""Receipts of erasures, and indexes by which retention and erasure find what they delete."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_28_retention"
down_revision = "2026_11_28_audit"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON_OBJECT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
LABELLED_BY_JOB = sa.text("job_id IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "erasures",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7."),
        sa.Column("state", sa.String(length=16), nullable=False, comment="running or done."),
        sa.Column("scope", sa.Text(), nullable=False, comment="job, sha256, tenant, or before and the day."),
        sa.Column("by", sa.Text(), nullable=False, comment="Who asked for it."),
        sa.Column("why", sa.Text(), nullable=False, comment="Why."),
        sa.Column("salt", sa.String(length=64), nullable=False, comment="Of the digests that say what was erased."),
        sa.Column("counts", JSON_OBJECT, nullable=False, comment="What was erased, by kind."),
        sa.Column(
            "releases",
            JSON_OBJECT,
            nullable=False,
            comment="Releases that learned from it, directly or by descent, and what became of their files.",
        ),
        sa.Column("runs", JSON_OBJECT, nullable=False, comment="Runs whose directories must go, on every machine."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was begun."),
        sa.Column("finished_at", TIME, nullable=True, comment="When nothing was left."),
        sa.CheckConstraint("state IN ('running', 'done')", name=op.f("ck_erasures_state")),
        sa.CheckConstraint("(state = 'done') = (finished_at IS NOT NULL)", name=op.f("ck_erasures_finished")),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
        comment="Receipts of erasures.",
    )
    op.create_table(
        "erasure_targets",
        sa.Column("erasure_id", sa.Uuid(as_uuid=False), nullable=False, comment="The erasure."),
        sa.Column("kind", sa.String(length=8), nullable=False, comment="job or image."),
        sa.Column("value", sa.String(length=64), nullable=False, comment="The job's id, or the content hash."),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasures.id"], name="fk_erasure_targets_erasure_id"),
        sa.PrimaryKeyConstraint("erasure_id", "kind", "value", name="pk_erasure_targets"),
        comment="What an erasure under way must erase, so that a crash loses none of it.",
    )
    op.create_table(
        "erased_digests",
        sa.Column("erasure_id", sa.Uuid(as_uuid=False), nullable=False, comment="The erasure."),
        sa.Column(
            "digest",
            sa.String(length=64),
            nullable=False,
            comment="HMAC-SHA256 of kind and value under the erasure's salt.",
        ),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasures.id"], name="fk_erased_digests_erasure_id"),
        sa.PrimaryKeyConstraint("erasure_id", "digest", name="pk_erased_digests"),
        comment="What was erased, as nobody can read it back.",
    )
    op.create_index("ix_embeddings_created_at", "embeddings", ["created_at"])
    op.create_index("ix_imported_rows_sha256", "imported_rows", ["sha256"])
    op.create_index(
        "ix_labels_job_id", "labels", ["job_id"], postgresql_where=LABELLED_BY_JOB, sqlite_where=LABELLED_BY_JOB
    )


def downgrade() -> None:
    op.drop_index("ix_labels_job_id", "labels")
    op.drop_index("ix_imported_rows_sha256", "imported_rows")
    op.drop_index("ix_embeddings_created_at", "embeddings")
    for table in ("erased_digests", "erasure_targets", "erasures"):
        op.drop_table(table)
