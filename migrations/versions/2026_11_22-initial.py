"""Jobs, verdicts, releases, policies and the running system."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_22_initial"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON_OBJECT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
IMMUTABLE = ("verdicts", "alias_moves", "policies")


def where(condition: str) -> dict[str, sa.TextClause]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    create_jobs()
    create_verdicts()
    create_embeddings()
    create_releases()
    create_aliases()
    create_alias_moves()
    create_policies()
    create_workers()
    create_leases()
    create_source_pauses()
    create_dead_letters()
    create_plugins_seen()
    refuse_updates()


def downgrade() -> None:
    for table in (
        "plugins_seen",
        "dead_letters",
        "source_pauses",
        "leases",
        "workers",
        "policies",
        "alias_moves",
        "aliases",
        "releases",
        "embeddings",
        "verdicts",
        "jobs",
    ):
        op.drop_table(table)
    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP FUNCTION code_worker_refuse_update()")


def refuse_updates() -> None:
    """What an appeal rests on cannot be changed, not even by hand; DELETE is left to retention."""
    if op.get_context().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION code_worker_refuse_update() RETURNS trigger LANGUAGE plpgsql AS $$ "
            "BEGIN RAISE EXCEPTION '% are immutable', TG_TABLE_NAME USING ERRCODE = 'integrity_constraint_violation'; "
            "END $$"
        )
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


def create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7, or UUIDv5 of tenant and key."),
        sa.Column("key", sa.Text(), nullable=True, comment="The caller's idempotency key."),
        sa.Column(
            "payload_sha256",
            sa.String(length=64),
            nullable=True,
            comment="Of the fields asked for; only with a key, to tell a repeat from a conflict.",
        ),
        sa.Column("uri", sa.Text(), nullable=False, comment="Where the image is."),
        sa.Column("head", sa.Text(), nullable=True, comment="Head asked for, if any."),
        sa.Column("tenant", sa.Text(), nullable=True, comment="On whose behalf."),
        sa.Column("content_type", sa.Text(), nullable=True, comment="Kind of content, for the policy."),
        sa.Column("priority", sa.SmallInteger(), nullable=False, comment="0 (backfill) to 9 (live)."),
        sa.Column("queue", sa.Text(), nullable=False, comment="Broker queue that the priority chose."),
        sa.Column("metadata", JSON_OBJECT, nullable=False, comment="The caller's own object."),
        sa.Column("state", sa.String(length=16), nullable=False, comment="See the check constraint."),
        sa.Column(
            "attempts",
            sa.Integer(),
            nullable=False,
            comment="Claims that have not ended in order: the present one and those of dead workers.",
        ),
        sa.Column("faults", sa.Integer(), nullable=False, comment="Transient faults that a worker reported."),
        sa.Column("revision", sa.Integer(), nullable=False, comment="Number of the next verdict; +1 per retry."),
        sa.Column("owner", sa.Text(), nullable=True, comment="Worker process that holds the claim."),
        sa.Column(
            "due_at",
            TIME,
            nullable=True,
            comment="When the sweeper must look: end of the lease or of the wait; null once finished.",
        ),
        sa.Column("not_before", TIME, nullable=True, comment="No claim before this."),
        sa.Column("published_at", TIME, nullable=True, comment="Last time a message for it was published."),
        sa.Column("claimed_at", TIME, nullable=True, comment="Last claim."),
        sa.Column("finished_at", TIME, nullable=True, comment="When the verdict was written."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was accepted."),
        sa.Column("last_fault", sa.Text(), nullable=True, comment="Reason and detail of the last transient fault."),
        sa.CheckConstraint(
            "(state IN ('accepted', 'running')) = (due_at IS NOT NULL)", name=op.f("ck_jobs_unfinished_is_due")
        ),
        sa.CheckConstraint("state IN ('accepted', 'running', 'done', 'quarantined')", name=op.f("ck_jobs_state")),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("ck_jobs_priority")),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        comment="Requests to judge one image; the truth about what is still to do.",
    )
    op.create_index("ix_jobs_created_at_id", "jobs", ["created_at", "id"])
    op.create_index("ix_jobs_due_at", "jobs", ["due_at"], **where("due_at IS NOT NULL"))
    op.create_index("ix_jobs_owner", "jobs", ["owner"], **where("owner IS NOT NULL"))
    op.create_index("ix_jobs_queue_claimed_at", "jobs", ["queue", "claimed_at"])
    op.create_index("ix_jobs_queue_published_at", "jobs", ["queue", "published_at"], **where("due_at IS NOT NULL"))
    op.create_index("ix_jobs_state_created_at_id", "jobs", ["state", "created_at", "id"])
    op.create_index(
        "ix_jobs_tenant_created_at_id", "jobs", ["tenant", "created_at", "id"], **where("tenant IS NOT NULL")
    )


def create_verdicts() -> None:
    op.create_table(
        "verdicts",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7."),
        sa.Column("job_id", sa.Uuid(as_uuid=False), nullable=False, comment="The job it answers."),
        sa.Column(
            "revision", sa.Integer(), nullable=False, comment="0 for the first, one more for each retry of the job."
        ),
        sa.Column("outcome", sa.String(length=16), nullable=False, comment="judged or rejected."),
        sa.Column("label", sa.String(length=16), nullable=True, comment="real, fake or uncertain; of judged ones."),
        sa.Column(
            "score", sa.Double(), nullable=True, comment="0 to 1, higher = more likely generated; of judged ones."
        ),
        sa.Column("reason", sa.String(length=32), nullable=True, comment="Why there is no label; of rejected ones."),
        sa.Column("detail", sa.Text(), nullable=False, comment="What exactly was wrong, for people."),
        sa.Column("uri", sa.Text(), nullable=False, comment="Where the image was read."),
        sa.Column("sha256", sa.String(length=64), nullable=True, comment="Of the bytes that were judged."),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True, comment="Number of those bytes."),
        sa.Column("format", sa.String(length=16), nullable=True, comment="Image format by content."),
        sa.Column("width", sa.Integer(), nullable=True, comment="Pixels."),
        sa.Column("height", sa.Integer(), nullable=True, comment="Pixels."),
        sa.Column("mode", sa.String(length=16), nullable=True, comment="Colour mode before conversion."),
        sa.Column("etag", sa.Text(), nullable=True, comment="The source's entity tag."),
        sa.Column("version_id", sa.Text(), nullable=True, comment="The source's version of the object."),
        sa.Column("release", sa.Text(), nullable=True, comment="Release that judged; the row outlives it."),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=True, comment="Of that release's manifest."),
        sa.Column("head", sa.Text(), nullable=True, comment="Head that scored."),
        sa.Column("head_sha256", sa.String(length=64), nullable=True, comment="Of that head's files."),
        sa.Column("policy", sa.Text(), nullable=True, comment="Policy that turned the score into a label."),
        sa.Column("low", sa.Double(), nullable=True, comment="Below this: real."),
        sa.Column("high", sa.Double(), nullable=True, comment="From this on: fake."),
        sa.Column("code_version", sa.String(length=64), nullable=True, comment="Version of the code that judged."),
        sa.Column("tenant", sa.Text(), nullable=True, comment="The job's."),
        sa.Column("content_type", sa.Text(), nullable=True, comment="The job's."),
        sa.Column("metadata", JSON_OBJECT, nullable=False, comment="The job's."),
        sa.Column("timings_ms", JSON_OBJECT, nullable=False, comment="Milliseconds by stage."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was written."),
        sa.CheckConstraint(
            "(outcome = 'judged') = (label IS NOT NULL) AND (outcome = 'judged') = (score IS NOT NULL)",
            name=op.f("ck_verdicts_judged_has_label_and_score"),
        ),
        sa.CheckConstraint(
            "(outcome = 'rejected') = (reason IS NOT NULL)", name=op.f("ck_verdicts_rejected_has_reason")
        ),
        sa.CheckConstraint("label IN ('real', 'fake', 'uncertain')", name=op.f("ck_verdicts_label")),
        sa.CheckConstraint("outcome IN ('judged', 'rejected')", name=op.f("ck_verdicts_outcome")),
        sa.CheckConstraint("score BETWEEN 0 AND 1", name=op.f("ck_verdicts_score")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_verdicts_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_verdicts"),
        sa.UniqueConstraint("job_id", "revision", name="uq_verdicts_job_id_revision"),
        comment="Immutable answers; UPDATE is refused, DELETE belongs to retention.",
    )
    op.create_index("ix_verdicts_created_at", "verdicts", ["created_at"])
    op.create_index("ix_verdicts_label_id", "verdicts", ["label", "id"], **where("label IS NOT NULL"))
    op.create_index("ix_verdicts_reason_id", "verdicts", ["reason", "id"], **where("reason IS NOT NULL"))
    op.create_index("ix_verdicts_release_id", "verdicts", ["release", "id"], **where("release IS NOT NULL"))
    op.create_index("ix_verdicts_sha256_id", "verdicts", ["sha256", "id"], **where("sha256 IS NOT NULL"))
    op.create_index("ix_verdicts_tenant_id", "verdicts", ["tenant", "id"], **where("tenant IS NOT NULL"))


def create_embeddings() -> None:
    op.create_table(
        "embeddings",
        sa.Column("encoder_sha256", sa.String(length=64), nullable=False, comment="Of the encoder's weights."),
        sa.Column("sha256", sa.String(length=64), nullable=False, comment="Of the image's bytes."),
        sa.Column("vector", sa.LargeBinary(), nullable=False, comment="192 float32, little-endian."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was computed."),
        sa.CheckConstraint("length(vector) = 768", name=op.f("ck_embeddings_vector_length")),
        sa.PrimaryKeyConstraint("encoder_sha256", "sha256", name="pk_embeddings"),
        comment="Embeddings by encoder and content.",
    )


def create_releases() -> None:
    op.create_table(
        "releases",
        sa.Column("id", sa.Text(), nullable=False, comment="Derived from the manifest's hash."),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False, comment="Of the manifest's bytes."),
        sa.Column("location", sa.Text(), nullable=False, comment="Where the files are, under the artifact root."),
        sa.Column("manifest", JSON_OBJECT, nullable=False, comment="The manifest itself."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was registered."),
        sa.Column("source", sa.Text(), nullable=False, comment="Where it came from."),
        sa.Column("status", sa.Text(), nullable=False, comment="ready, or why it must not be promoted."),
        sa.PrimaryKeyConstraint("id", name="pk_releases"),
        comment="Encoder, heads and thresholds deployed as one.",
    )
    op.create_index("ix_releases_created_at", "releases", ["created_at"])


def create_aliases() -> None:
    op.create_table(
        "aliases",
        sa.Column("name", sa.Text(), nullable=False, comment="champion, challenger, …"),
        sa.Column("release_id", sa.Text(), nullable=False, comment="Where it points now."),
        sa.Column("updated_at", TIME, nullable=False, comment="Last move."),
        sa.Column("updated_by", sa.Text(), nullable=False, comment="Who moved it."),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name="fk_aliases_release_id"),
        sa.PrimaryKeyConstraint("name", name="pk_aliases"),
        comment="Names that point to releases.",
    )


def create_alias_moves() -> None:
    op.create_table(
        "alias_moves",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False, comment="Order of the moves."),
        sa.Column("alias", sa.Text(), nullable=False, comment="Which name."),
        sa.Column("release_id", sa.Text(), nullable=False, comment="Where it points afterwards."),
        sa.Column("previous_id", sa.Text(), nullable=True, comment="Where it pointed before."),
        sa.Column("undoes", BIG_KEY, nullable=True, comment="The move that this took back."),
        sa.Column("at", TIME, nullable=False, comment="When."),
        sa.Column("by", sa.Text(), nullable=False, comment="Who."),
        sa.Column("reason", sa.Text(), nullable=False, comment="Why."),
        sa.ForeignKeyConstraint(["previous_id"], ["releases.id"], name="fk_alias_moves_previous_id"),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name="fk_alias_moves_release_id"),
        sa.ForeignKeyConstraint(["undoes"], ["alias_moves.id"], name="fk_alias_moves_undoes"),
        sa.PrimaryKeyConstraint("id", name="pk_alias_moves"),
        comment="History of aliases, append-only.",
    )
    op.create_index("ix_alias_moves_alias_id", "alias_moves", ["alias", "id"])


def create_policies() -> None:
    op.create_table(
        "policies",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Empty: every tenant."),
        sa.Column("content_type", sa.Text(), nullable=False, comment="Empty: every content type."),
        sa.Column("version", sa.Integer(), nullable=False, comment="From 1; the highest is in force."),
        sa.Column("head", sa.Text(), nullable=True, comment="Head to judge with, if the policy names one."),
        sa.Column("low", sa.Double(), nullable=False, comment="Below this: real."),
        sa.Column("high", sa.Double(), nullable=False, comment="From this on: fake."),
        sa.Column("created_at", TIME, nullable=False, comment="When it came into force."),
        sa.Column("created_by", sa.Text(), nullable=False, comment="Who set it."),
        sa.Column("note", sa.Text(), nullable=False, comment="Why."),
        sa.CheckConstraint(
            "low BETWEEN 0 AND 1 AND high BETWEEN 0 AND 1 AND low <= high", name=op.f("ck_policies_thresholds")
        ),
        sa.PrimaryKeyConstraint("id", name="pk_policies"),
        sa.UniqueConstraint("tenant", "content_type", "version", name="uq_policies_tenant_content_type_version"),
        comment="Thresholds per tenant and content type, versioned.",
    )


def create_workers() -> None:
    op.create_table(
        "workers",
        sa.Column("owner", sa.Text(), nullable=False, comment="The name that its claims carry."),
        sa.Column("host", sa.Text(), nullable=False, comment="Machine."),
        sa.Column("pid", sa.Integer(), nullable=False, comment="Process id there."),
        sa.Column("version", sa.Text(), nullable=False, comment="Version of the code."),
        sa.Column("release", sa.Text(), nullable=True, comment="Release loaded now."),
        sa.Column("started_at", TIME, nullable=False, comment="First beat."),
        sa.Column("seen_at", TIME, nullable=False, comment="Last beat."),
        sa.Column("info", JSON_OBJECT, nullable=False, comment="Device, precision, rates, …"),
        sa.PrimaryKeyConstraint("owner", name="pk_workers"),
        comment="Worker processes by their last beat.",
    )
    op.create_index("ix_workers_seen_at", "workers", ["seen_at"])


def create_leases() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False, comment="The role."),
        sa.Column("owner", sa.Text(), nullable=False, comment="Who plays it."),
        sa.Column("until", TIME, nullable=False, comment="Until when, in the database's time."),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
        comment="Roles that one process plays at a time.",
    )


def create_source_pauses() -> None:
    op.create_table(
        "source_pauses",
        sa.Column("source", sa.Text(), nullable=False, comment="Such as s3://bucket."),
        sa.Column("until", TIME, nullable=False, comment="When it may be tried again."),
        sa.Column("since", TIME, nullable=False, comment="Start of the trouble."),
        sa.Column("detail", sa.Text(), nullable=False, comment="What the source said."),
        sa.PrimaryKeyConstraint("source", name="pk_source_pauses"),
        comment="Sources that are left alone for a while.",
    )


def create_dead_letters() -> None:
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False, comment="UUIDv7."),
        sa.Column("task", sa.Text(), nullable=False, comment="Task it was addressed to."),
        sa.Column("body", sa.Text(), nullable=False, comment="The message, cut at 64 KiB."),
        sa.Column("error", sa.Text(), nullable=False, comment="Why it could not be read."),
        sa.Column("at", TIME, nullable=False, comment="When it came."),
        sa.PrimaryKeyConstraint("id", name="pk_dead_letters"),
        comment="Unreadable broker messages.",
    )


def create_plugins_seen() -> None:
    op.create_table(
        "plugins_seen",
        sa.Column("host", sa.Text(), nullable=False, comment="Machine."),
        sa.Column("name", sa.Text(), nullable=False, comment="Plugin."),
        sa.Column("version", sa.Text(), nullable=False, comment="Its version; empty for a single file."),
        sa.Column("distribution", sa.Text(), nullable=True, comment="Installed package, if any."),
        sa.Column("hooks", JSON_OBJECT, nullable=False, comment="Hooks it implements."),
        sa.Column("first_seen", TIME, nullable=False, comment="First worker start."),
        sa.Column("last_seen", TIME, nullable=False, comment="Last worker start."),
        sa.PrimaryKeyConstraint("host", "name", "version", name="pk_plugins_seen"),
        comment="Plugins by host and version.",
    )
