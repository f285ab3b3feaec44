"""The index of claim times holds claimed jobs only: accepting and ringing for a job no longer write an entry in it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_24_claimed_jobs"
down_revision = "2026_11_24_learning"
branch_labels = None
depends_on = None

NAME = "ix_jobs_queue_claimed_at"
CLAIMED = sa.text("claimed_at IS NOT NULL")


def upgrade() -> None:
    op.drop_index(NAME, "jobs")
    op.create_index(NAME, "jobs", ["queue", "claimed_at"], postgresql_where=CLAIMED, sqlite_where=CLAIMED)


def downgrade() -> None:
    op.drop_index(NAME, "jobs")
    op.create_index(NAME, "jobs", ["queue", "claimed_at"])
