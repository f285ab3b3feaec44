"""The audit: a chain of entries, and tables of record that lose rows only under an entry that says why."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2026_11_28_audit"
down_revision = "2026_11_24_claimed_jobs"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
KEPT = ("verdicts", "labels", "alias_moves", "policies", "snapshots")
OPEN = "EXISTS (SELECT 1 FROM removals)"


def upgrade() -> None:
    create_audit()
    create_removals()
    if op.get_context().dialect.name == "postgresql":
        guard_postgresql()
    else:
        guard_sqlite()


def downgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        unguard_postgresql()
    else:
        for table in KEPT:
            op.execute(f"DROP TRIGGER {table}_kept")
        op.execute("DROP TRIGGER snapshots_immutable")
        op.execute(
            "CREATE TRIGGER snapshots_immutable BEFORE UPDATE ON snapshots "
            "BEGIN SELECT RAISE(ABORT, 'snapshots are immutable'); END"
        )
    op.drop_table("removals")
    op.drop_table("audit")


def create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", BIG_KEY, autoincrement=False, nullable=False, comment="From 1, without gaps."),
        sa.Column("at", TIME, nullable=False, comment="When, by the database's clock."),
        sa.Column("actor", sa.Text(), nullable=False, comment="Who did it."),
        sa.Column("action", sa.Text(), nullable=False, comment="What was done: release.promote, label.add, …"),
        sa.Column("subject", sa.Text(), nullable=False, comment="To what: an id or a name, never a content hash."),
        sa.Column("details", sa.Text(), nullable=False, comment="JSON object, byte for byte as it was hashed."),
        sa.Column("previous", sa.String(length=64), nullable=False, comment="Hash of the entry before."),
        sa.Column("hash", sa.String(length=64), nullable=False, comment="sha256 of all the other columns."),
        sa.CheckConstraint("seq >= 1", name=op.f("ck_audit_seq")),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
        sa.UniqueConstraint("previous", name="uq_audit_previous"),
        comment="Who changed what, append-only; each entry holds the hash of the one before.",
    )
    op.create_index("ix_audit_subject_seq", "audit", ["subject", "seq"])


def create_removals() -> None:
    op.create_table(
        "removals",
        sa.Column("audit_seq", BIG_KEY, autoincrement=False, nullable=False, comment="The entry that says why."),
        sa.Column("closed", BIG_KEY, nullable=False, comment="Points nowhere, so that this row cannot be committed."),
        sa.CheckConstraint("closed = -audit_seq", name=op.f("ck_removals_closed")),
        sa.ForeignKeyConstraint(["audit_seq"], ["audit.seq"], name="fk_removals_audit_seq"),
        sa.ForeignKeyConstraint(
            ["closed"], ["removals.audit_seq"], name="fk_removals_closed", deferrable=True, initially="DEFERRED"
        ),
        sa.PrimaryKeyConstraint("audit_seq", name="pk_removals"),
        comment="Never has rows outside a transaction: while one is there, tables of record may lose rows.",
    )


def guard_sqlite() -> None:
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
            "BEGIN SELECT RAISE(ABORT, 'audit entries are immutable'); END"
        )
    # REPLACE deletes what is in its way without asking the trigger above.
    op.execute(
        "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit WHEN EXISTS (SELECT 1 FROM audit WHERE seq = NEW.seq) "
        "BEGIN SELECT RAISE(ABORT, 'audit entries are immutable'); END"
    )
    for table in KEPT:
        op.execute(
            f"CREATE TRIGGER {table}_kept BEFORE DELETE ON {table} WHEN NOT {OPEN} "
            f"BEGIN SELECT RAISE(ABORT, '{table} are kept: only erasure and retention remove them'); END"
        )
    op.execute("DROP TRIGGER snapshots_immutable")
    op.execute(
        f"CREATE TRIGGER snapshots_immutable BEFORE UPDATE ON snapshots WHEN NOT {OPEN} "
        "BEGIN SELECT RAISE(ABORT, 'snapshots are immutable'); END"
    )


def guard_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION code_worker_refuse_removal() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF TG_OP = 'DELETE' AND {OPEN} THEN RETURN OLD; END IF; "
        "RAISE EXCEPTION '% are kept: only erasure and retention remove them', TG_TABLE_NAME "
        "USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(
        "CREATE FUNCTION code_worker_refuse_snapshot_update() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF {OPEN} THEN RETURN NEW; END IF; "
        "RAISE EXCEPTION 'snapshots are immutable' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(
        "CREATE FUNCTION code_worker_refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'audit entries are immutable' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_immutable BEFORE UPDATE OR DELETE ON audit "
        "FOR EACH ROW EXECUTE FUNCTION code_worker_refuse_audit_change()"
    )
    op.execute(
        "CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION code_worker_refuse_audit_change()"
    )
    for table in KEPT:
        op.execute(
            f"CREATE TRIGGER {table}_kept BEFORE DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION code_worker_refuse_removal()"
        )
        op.execute(
            f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION code_worker_refuse_removal()"
        )
    op.execute("DROP TRIGGER snapshots_immutable ON snapshots")
    op.execute(
        "CREATE TRIGGER snapshots_immutable BEFORE UPDATE ON snapshots "
        "FOR EACH ROW EXECUTE FUNCTION code_worker_refuse_snapshot_update()"
    )


def unguard_postgresql() -> None:
    for table in KEPT:
        op.execute(f"DROP TRIGGER {table}_kept ON {table}")
        op.execute(f"DROP TRIGGER {table}_no_truncate ON {table}")
    op.execute("DROP TRIGGER snapshots_immutable ON snapshots")
    op.execute(
        "CREATE TRIGGER snapshots_immutable BEFORE UPDATE ON snapshots "
        "FOR EACH ROW EXECUTE FUNCTION code_worker_refuse_update()"
    )
    op.execute("DROP TRIGGER audit_immutable ON audit")
    op.execute("DROP TRIGGER audit_no_truncate ON audit")
    for function in ("refuse_removal", "refuse_snapshot_update", "refuse_audit_change"):
        op.execute(f"DROP FUNCTION code_worker_{function}()")
