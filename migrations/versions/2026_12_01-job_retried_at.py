"""Jobs know when they were last asked to be judged again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_12_01_job_retried_at"
down_revision = "2026_11_30_head_plugins"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs",
        sa.Column(
            "retried_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When it was last accepted again; null: never, or before this was kept.",
        ),
    )


def downgrade() -> None:
    op.drop_column("jobs", "retried_at")
