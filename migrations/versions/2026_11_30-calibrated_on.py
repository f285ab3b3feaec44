"""Policies say on which release they were calibrated."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_calibrated_on"
down_revision = "2026_11_28_retention"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "policies",
        sa.Column(
            "release_id",
            sa.Text(),
            nullable=True,
            comment="Release that it was calibrated on; null: set by hand, or before this was kept.",
        ),
    )


def downgrade() -> None:
    op.drop_column("policies", "release_id")
