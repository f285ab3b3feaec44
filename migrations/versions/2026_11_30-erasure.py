"""Erasures with their scope, whose image it was after its job is gone, copies about to be deleted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_30_erasure"
down_revision = "2026_11_30_groups"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON_OBJECT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
OF_A_TENANT = sa.text("tenant IS NOT NULL")
RUNNING = sa.text("state = 'running'")
LEARNED = sa.text("learned")
KIND = "job, image, erased (an image whose rows are gone) or uri."
VALUE = "Job's id, content hash, or digest of an address."


def upgrade() -> None:
    extend_erasures()
    create_image_origins()
    op.create_table(
        "copies_to_drop",
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="Of the bytes, and the copy's name."),
        sa.Column("created_at", TIME, nullable=False, comment="When its row went."),
        sa.PrimaryKeyConstraint("sha256", name="pk_copies_to_drop"),
        comment="Copies in the dataset storage that are about to be deleted.",
    )
    op.create_index("ix_kept_images_created_at", "kept_images", ["created_at"])
    # What sources said named the object that met the trouble.
    op.execute("UPDATE source_pauses SET detail = 'said before the last upgrade'")
    say_of_targets(KIND, VALUE)


def downgrade() -> None:
    say_of_targets("job or image.", "The job's id, or the content hash.")
    # An older version knows neither.
    op.execute("DELETE FROM erasure_targets WHERE kind NOT IN ('job', 'image')")
    op.drop_index("ix_kept_images_created_at", "kept_images")
    op.drop_table("copies_to_drop")
    op.drop_table("image_origins")
    for name in ("learned", "running", "finished_at"):
        op.drop_index(f"ix_erasures_{name}", "erasures")
    for name in ("last_look", "learned", "step", "target"):
        op.drop_column("erasures", name)


def extend_erasures() -> None:
    target = sa.Column("target", JSON_OBJECT, comment="The scope with what it names; null once finished.")
    step = sa.Column("step", sa.Text(), server_default="jobs", nullable=False, comment="What is erased now.")
    learned = sa.Column(
        "learned",
        sa.Boolean(),
        server_default=sa.false(),
        nullable=False,
        comment="Whether it names runs or releases.",
    )
    look = sa.Column(
        "last_look", JSON_OBJECT, comment="What the look over all tables and the storage found at the end."
    )
    for column in (target, step, learned, look):
        op.add_column("erasures", column)
    cast = "::jsonb" if op.get_context().dialect.name == "postgresql" else ""
    op.execute(f"UPDATE erasures SET learned = true WHERE runs <> '[]'{cast} OR releases <> '{{}}'{cast}")
    op.create_index("ix_erasures_finished_at", "erasures", ["finished_at"])
    op.create_index("ix_erasures_running", "erasures", ["id"], postgresql_where=RUNNING, sqlite_where=RUNNING)
    op.create_index("ix_erasures_learned", "erasures", ["id"], postgresql_where=LEARNED, sqlite_where=LEARNED)


def create_image_origins() -> None:
    op.create_table(
        "image_origins",
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="Of the image's bytes."),
        sa.Column("job_id", sa.Uuid(as_uuid=False), nullable=False, comment="The job that judged it."),
        sa.Column("tenant", sa.Text(), nullable=True, comment="The job's."),
        sa.Column("accepted_at", TIME, nullable=False, comment="When the job was accepted."),
        sa.PrimaryKeyConstraint("sha256", "job_id", name="pk_image_origins"),
        comment="Whose image it was, once retention took the job and while something of the image is kept.",
    )
    op.create_index("ix_image_origins_job_id", "image_origins", ["job_id"])
    op.create_index("ix_image_origins_accepted_at", "image_origins", ["accepted_at"])
    op.create_index(
        "ix_image_origins_tenant",
        "image_origins",
        ["tenant"],
        postgresql_where=OF_A_TENANT,
        sqlite_where=OF_A_TENANT,
    )


def say_of_targets(kind: str, value: str) -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute(f"COMMENT ON COLUMN erasure_targets.kind IS '{kind}'")
        quoted = value.replace("'", "''")
        op.execute(f"COMMENT ON COLUMN erasure_targets.value IS '{quoted}'")
