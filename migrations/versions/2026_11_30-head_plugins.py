"""Verdicts name the plugin that scored, and its version."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_head_plugins"
down_revision = "2026_11_30_erasure"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "verdicts",
        sa.Column(
            "head_plugin",
            sa.Text(),
            nullable=True,
            comment="Distribution and version of the plugin that scored; null: before this was kept.",
        ),
    )


def downgrade() -> None:
    op.drop_column("verdicts", "head_plugin")
