"""Groups of images, each in one part of the labelled ones, and what finds near-duplicates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_groups"
down_revision = "2026_11_30_gate_comparisons"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BANDS = ("First 16 bits of the hash, for finding near ones.", "The next 16.", "The next 16.", "The last 16.")
ONCE = ("image_groups", "secrets")
"""Tables whose rows are never changed; a trigger refuses UPDATE."""
ADDED = ("phash", "band_0", "band_1", "band_2", "band_3", "group_id")


def upgrade() -> None:
    op.create_table(
        "secrets",
        sa.Column("name", sa.Text(), nullable=False, comment="What it is for."),
        sa.Column("value", sa.LargeBinary(), nullable=False, comment="Random bytes; never shown."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was made."),
        sa.PrimaryKeyConstraint("name", name="pk_secrets"),
        comment="Secrets of this installation, such as the one that decides the hold-out.",
    )
    op.create_table(
        "image_groups",
        sa.Column("id", sa.String(length=64), nullable=False, comment="HMAC-SHA256 of what it was made for."),
        sa.Column("joins", sa.String(length=64), comment="Group that this name or old image stands for."),
        sa.Column(
            "split",
            sa.String(length=16),
            nullable=False,
            comment="train, validation, holdout, or none: left out of all.",
        ),
        sa.Column("created_at", TIME, nullable=False, comment="When it was decided."),
        sa.CheckConstraint(
            "split IN ('train', 'validation', 'holdout', 'none')", name=op.f("ck_image_groups_split")
        ),
        sa.PrimaryKeyConstraint("id", name="pk_image_groups"),
        comment="Which images are learned from, and which are only measured on.",
    )
    op.create_index("ix_image_groups_joins", "image_groups", ["joins"])
    for table in ONCE:
        refuse_update(table)
    op.add_column("labels", sa.Column("group", sa.Text(), comment="Record or post that the image belongs to, if any."))
    op.add_column(
        "kept_images",
        sa.Column(
            "phash",
            sa.String(length=16),
            comment="Perceptual hash in hexadecimal; null: not computed, or it cannot be decoded.",
        ),
    )
    for band, comment in enumerate(BANDS):
        op.add_column("kept_images", sa.Column(f"band_{band}", sa.Integer(), comment=comment))
    op.add_column(
        "kept_images",
        sa.Column(
            "group_id",
            sa.String(length=64),
            comment="Its group; null: labelled before there were groups, and not looked at since.",
        ),
    )
    for band in range(len(BANDS)):
        op.create_index(f"ix_kept_images_band_{band}", "kept_images", [f"band_{band}"])
    op.create_index("ix_kept_images_phash_group_id", "kept_images", ["phash", "group_id"])
    op.create_index("ix_kept_images_group_id_sha256", "kept_images", ["group_id", "sha256"])


def refuse_update(table: str) -> None:
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


def downgrade() -> None:
    op.drop_index("ix_kept_images_group_id_sha256", "kept_images")
    op.drop_index("ix_kept_images_phash_group_id", "kept_images")
    for band in range(len(BANDS)):
        op.drop_index(f"ix_kept_images_band_{band}", "kept_images")
    for column in ADDED:
        op.drop_column("kept_images", column)
    op.drop_column("labels", "group")
    op.drop_table("image_groups")
    op.drop_table("secrets")
