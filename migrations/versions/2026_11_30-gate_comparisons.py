"""What the gate compared, so that its chance of error is spent once over a champion's reign."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_gate_comparisons"
down_revision = "2026_11_30_calibrated_on"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "gate_comparisons",
        sa.Column("run_id", sa.Uuid(as_uuid=False), nullable=False, comment="Run."),
        sa.Column("champion", sa.Text(), nullable=False, comment="Release that the candidate met."),
        sa.Column("candidate", sa.Text(), nullable=False, comment="Release that wanted its place."),
        sa.Column("images", sa.Integer(), nullable=False, comment="Of the hold-out."),
        sa.Column("level", sa.Double(), nullable=False, comment="Chance that an equal release passes."),
        sa.Column("created_at", TIME, nullable=False, comment="When."),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_gate_comparisons_run_id"),
        sa.PrimaryKeyConstraint("run_id", "champion", name="pk_gate_comparisons"),
        comment="What was spent of each champion's chance to be replaced by luck.",
    )
    op.create_index("ix_gate_comparisons_champion_created_at", "gate_comparisons", ["champion", "created_at"])


def downgrade() -> None:
    op.drop_index("ix_gate_comparisons_champion_created_at", "gate_comparisons")
    op.drop_table("gate_comparisons")
