"""Every table, and the triggers that keep what an appeal rests on as it was written."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_12_01_initial"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
UUID = sa.Uuid(as_uuid=False)
JSON_OBJECT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = (
    "jobs", "verdicts", "embeddings", "releases", "aliases", "alias_moves", "policies", "workers", "leases",
    "source_pauses", "dead_letters", "plugins_seen", "labels", "imported_rows", "image_groups", "kept_images",
    "image_origins", "copies_to_drop", "secrets", "snapshots", "runs", "run_metrics", "gate_comparisons",
    "schedule_slots", "shadow_scores", "erasures", "erasure_targets", "erased_digests", "audit", "removals",
)
"""In the order in which they are made."""
IMMUTABLE = ("verdicts", "alias_moves", "policies", "labels", "image_groups", "secrets")
"""Tables whose rows are never changed."""
KEPT = ("verdicts", "labels", "alias_moves", "policies", "snapshots")
"""Tables that lose rows only while a row of `removals` is there, so under an entry of the audit that says why."""
OPEN = "EXISTS (SELECT 1 FROM removals)"
FUNCTIONS = ("refuse_update", "refuse_removal", "refuse_snapshot_update", "refuse_audit_change")


def upgrade() -> None:
    for table in TABLES:
        globals()[f"create_{table}"]()
    if op.get_context().dialect.name == "postgresql":
        guard_postgresql()
    else:
        guard_sqlite()


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)
    if op.get_context().dialect.name == "postgresql":
        for function in FUNCTIONS:
            op.execute(f"DROP FUNCTION code_worker_{function}()")


def where(condition: str) -> dict[str, sa.TextClause]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def guard_sqlite() -> None:
    for table in IMMUTABLE:
        op.execute(
            f"CREATE TRIGGER {table}_immutable BEFORE UPDATE ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} are immutable'); END"
        )
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
            "BEGIN SELECT RAISE(ABORT, 'audit entries are immutable'); END"
        )
    # REPLACE deletes what is in its way without asking the trigger above.
    op.execute(
        "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
        "WHEN EXISTS (SELECT 1 FROM audit WHERE seq = NEW.seq) "
        "BEGIN SELECT RAISE(ABORT, 'audit entries are immutable'); END"
    )
    for table in KEPT:
        op.execute(
            f"CREATE TRIGGER {table}_kept BEFORE DELETE ON {table} WHEN NOT {OPEN} "
            f"BEGIN SELECT RAISE(ABORT, '{table} are kept: only erasure and retention remove them'); END"
        )
    op.execute(
        f"CREATE TRIGGER snapshots_immutable BEFORE UPDATE ON snapshots WHEN NOT {OPEN} "
        "BEGIN SELECT RAISE(ABORT, 'snapshots are immutable'); END"
    )


def refuse(function: str, rule: str) -> None:
    op.execute(
        f"CREATE FUNCTION code_worker_{function}() RETURNS trigger LANGUAGE plpgsql AS $$ "
        f"BEGIN {rule} USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )


def guard_postgresql() -> None:
    refuse("refuse_update", "RAISE EXCEPTION '% are immutable', TG_TABLE_NAME")
    refuse(
        "refuse_removal",
        f"IF TG_OP = 'DELETE' AND {OPEN} THEN RETURN OLD; END IF; "
        "RAISE EXCEPTION '% are kept: only erasure and retention remove them', TG_TABLE_NAME",
    )
    refuse(
        "refuse_snapshot_update",
        f"IF {OPEN} THEN RETURN NEW; END IF; RAISE EXCEPTION 'snapshots are immutable'",
    )
    refuse("refuse_audit_change", "RAISE EXCEPTION 'audit entries are immutable'")
    for table in IMMUTABLE:
        trigger(f"{table}_immutable BEFORE UPDATE ON {table} FOR EACH ROW", "refuse_update")
    trigger("audit_immutable BEFORE UPDATE OR DELETE ON audit FOR EACH ROW", "refuse_audit_change")
    trigger("audit_no_truncate BEFORE TRUNCATE ON audit FOR EACH STATEMENT", "refuse_audit_change")
    for table in KEPT:
        trigger(f"{table}_kept BEFORE DELETE ON {table} FOR EACH ROW", "refuse_removal")
        trigger(f"{table}_no_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT", "refuse_removal")
    trigger("snapshots_immutable BEFORE UPDATE ON snapshots FOR EACH ROW", "refuse_snapshot_update")


def trigger(what: str, function: str) -> None:
    op.execute(f"CREATE TRIGGER {what} EXECUTE FUNCTION code_worker_{function}()")


def create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", UUID, nullable=False, comment="UUIDv7, or UUIDv5 of tenant and key."),
        sa.Column("key", sa.Text(), comment="The caller's idempotency key."),
        sa.Column("payload_sha256", sa.String(64),
            comment="Of the fields asked for; only with a key, to tell a repeat from a conflict."),
        sa.Column("uri", sa.Text(), nullable=False, comment="Where the image is."),
        sa.Column("head", sa.Text(), comment="Head asked for, if any."),
        sa.Column("tenant", sa.Text(), comment="On whose behalf."),
        sa.Column("content_type", sa.Text(), comment="Kind of content, for the policy."),
        sa.Column("priority", sa.SmallInteger(), nullable=False, comment="0 (backfill) to 9 (live)."),
        sa.Column("queue", sa.Text(), nullable=False, comment="Broker queue that the priority chose."),
        sa.Column("metadata", JSON_OBJECT, nullable=False, comment="The caller's own object."),
        sa.Column("state", sa.String(16), nullable=False, comment="See the check constraint."),
        sa.Column("attempts", sa.Integer(), nullable=False,
            comment="Claims that have not ended in order: the present one and those of dead workers."),
        sa.Column("faults", sa.Integer(), nullable=False, comment="Transient faults that a worker reported."),
        sa.Column("revision", sa.Integer(), nullable=False, comment="Number of the next verdict; +1 per retry."),
        sa.Column("owner", sa.Text(), comment="Worker process that holds the claim."),
        sa.Column("due_at", TIME,
            comment="When the sweeper must look: end of the lease or of the wait; null once finished."),
        sa.Column("not_before", TIME, comment="No claim before this."),
        sa.Column("published_at", TIME, comment="Last time a message for it was published."),
        sa.Column("claimed_at", TIME, comment="Last claim."),
        sa.Column("finished_at", TIME, comment="When the verdict was written."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was accepted."),
        sa.Column("retried_at", TIME, comment="When it was last accepted again; null: never."),
        sa.Column("last_fault", sa.Text(), comment="Reason and detail of the last transient fault."),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("ck_jobs_priority")),
        sa.CheckConstraint("state IN ('accepted', 'running', 'done', 'quarantined')", name=op.f("ck_jobs_state")),
        sa.CheckConstraint("(state IN ('accepted', 'running')) = (due_at IS NOT NULL)",
            name=op.f("ck_jobs_unfinished_is_due")),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        comment="Requests to judge one image; the truth about what is still to do.",
    )
    op.create_index("ix_jobs_created_at_id", "jobs", ["created_at", "id"])
    op.create_index("ix_jobs_due_at", "jobs", ["due_at"], **where("due_at IS NOT NULL"))
    op.create_index("ix_jobs_owner", "jobs", ["owner"], **where("owner IS NOT NULL"))
    op.create_index("ix_jobs_queue_claimed_at", "jobs", ["queue", "claimed_at"], **where("claimed_at IS NOT NULL"))
    op.create_index("ix_jobs_queue_published_at", "jobs", ["queue", "published_at"], **where("due_at IS NOT NULL"))
    op.create_index("ix_jobs_state_created_at_id", "jobs", ["state", "created_at", "id"])
    op.create_index(
        "ix_jobs_tenant_created_at_id", "jobs", ["tenant", "created_at", "id"], **where("tenant IS NOT NULL")
    )


def create_verdicts() -> None:
    op.create_table(
        "verdicts",
        sa.Column("id", UUID, nullable=False, comment="UUIDv7."),
        sa.Column("job_id", UUID, nullable=False, comment="The job it answers."),
        sa.Column("revision", sa.Integer(), nullable=False,
            comment="0 for the first, one more for each retry of the job."),
        sa.Column("outcome", sa.String(16), nullable=False, comment="judged or rejected."),
        sa.Column("label", sa.String(16), comment="real, fake or uncertain; of judged ones."),
        sa.Column("score", sa.Double(), comment="0 to 1, higher = more likely generated; of judged ones."),
        sa.Column("reason", sa.String(32), comment="Why there is no label; of rejected ones."),
        sa.Column("detail", sa.Text(), nullable=False, comment="What exactly was wrong, for people."),
        sa.Column("uri", sa.Text(), nullable=False, comment="Where the image was read."),
        sa.Column("sha256", sa.String(64), comment="Of the bytes that were judged."),
        sa.Column("size_bytes", sa.BigInteger(), comment="Number of those bytes."),
        sa.Column("format", sa.String(16), comment="Image format by content."),
        sa.Column("width", sa.Integer(), comment="Pixels."),
        sa.Column("height", sa.Integer(), comment="Pixels."),
        sa.Column("mode", sa.String(16), comment="Colour mode before conversion."),
        sa.Column("etag", sa.Text(), comment="The source's entity tag."),
        sa.Column("version_id", sa.Text(), comment="The source's version of the object."),
        sa.Column("release", sa.Text(), comment="Release that judged; the row outlives it."),
        sa.Column("manifest_sha256", sa.String(64), comment="Of that release's manifest."),
        sa.Column("head", sa.Text(), comment="Head that scored."),
        sa.Column("head_sha256", sa.String(64), comment="Of that head's files."),
        sa.Column("head_plugin", sa.Text(),
            comment="Distribution and version of the plugin that scored; null: it is not known."),
        sa.Column("policy", sa.Text(), comment="Policy that turned the score into a label."),
        sa.Column("low", sa.Double(), comment="Below this: real."),
        sa.Column("high", sa.Double(), comment="From this on: fake."),
        sa.Column("code_version", sa.String(64), comment="Version of the code that judged."),
        sa.Column("tenant", sa.Text(), comment="The job's."),
        sa.Column("content_type", sa.Text(), comment="The job's."),
        sa.Column("metadata", JSON_OBJECT, nullable=False, comment="The job's."),
        sa.Column("timings_ms", JSON_OBJECT, nullable=False, comment="Milliseconds by stage."),
        sa.Column("supersedes", UUID, comment="Verdict that this one judges again; that one stays."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was written."),
        sa.CheckConstraint(
            "(outcome = 'judged') = (label IS NOT NULL) AND (outcome = 'judged') = (score IS NOT NULL)",
            name=op.f("ck_verdicts_judged_has_label_and_score")),
        sa.CheckConstraint("label IN ('real', 'fake', 'uncertain')", name=op.f("ck_verdicts_label")),
        sa.CheckConstraint("outcome IN ('judged', 'rejected')", name=op.f("ck_verdicts_outcome")),
        sa.CheckConstraint("(outcome = 'rejected') = (reason IS NOT NULL)",
            name=op.f("ck_verdicts_rejected_has_reason")),
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
        sa.Column("encoder_sha256", sa.String(64), nullable=False, comment="Of the encoder's weights."),
        sa.Column("sha256", sa.String(64), nullable=False, comment="Of the image's bytes."),
        sa.Column("vector", sa.LargeBinary(), nullable=False, comment="192 float32, little-endian."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was computed."),
        sa.CheckConstraint("length(vector) = 768", name=op.f("ck_embeddings_vector_length")),
        sa.PrimaryKeyConstraint("encoder_sha256", "sha256", name="pk_embeddings"),
        comment="Embeddings by encoder and content.",
    )
    op.create_index("ix_embeddings_created_at", "embeddings", ["created_at"])


def create_releases() -> None:
    op.create_table(
        "releases",
        sa.Column("id", sa.Text(), nullable=False, comment="Derived from the manifest's hash."),
        sa.Column("manifest_sha256", sa.String(64), nullable=False, comment="Of the manifest's bytes."),
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
        sa.Column("previous_id", sa.Text(), comment="Where it pointed before."),
        sa.Column("undoes", BIG_KEY, comment="The move that this took back."),
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
        sa.Column("id", UUID, nullable=False, comment="UUIDv7."),
        sa.Column("tenant", sa.Text(), nullable=False, comment="Empty: every tenant."),
        sa.Column("content_type", sa.Text(), nullable=False, comment="Empty: every content type."),
        sa.Column("version", sa.Integer(), nullable=False, comment="From 1; the highest is in force."),
        sa.Column("head", sa.Text(), comment="Head to judge with, if the policy names one."),
        sa.Column("low", sa.Double(), nullable=False, comment="Below this: real."),
        sa.Column("high", sa.Double(), nullable=False, comment="From this on: fake."),
        sa.Column("created_at", TIME, nullable=False, comment="When it came into force."),
        sa.Column("created_by", sa.Text(), nullable=False, comment="Who set it."),
        sa.Column("note", sa.Text(), nullable=False, comment="Why."),
        sa.Column("evidence", JSON_OBJECT, comment="Data and figures it was calibrated on, if it was."),
        sa.Column("release_id", sa.Text(), comment="Release that it was calibrated on; null: set by hand."),
        sa.CheckConstraint("low BETWEEN 0 AND 1 AND high BETWEEN 0 AND 1 AND low <= high",
            name=op.f("ck_policies_thresholds")),
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
        sa.Column("release", sa.Text(), comment="Release loaded now."),
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
        sa.Column("id", UUID, nullable=False, comment="UUIDv7."),
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
        sa.Column("distribution", sa.Text(), comment="Installed package, if any."),
        sa.Column("hooks", JSON_OBJECT, nullable=False, comment="Hooks it implements."),
        sa.Column("first_seen", TIME, nullable=False, comment="First worker start."),
        sa.Column("last_seen", TIME, nullable=False, comment="Last worker start."),
        sa.PrimaryKeyConstraint("host", "name", "version", name="pk_plugins_seen"),
        comment="Plugins by host and version.",
    )


def create_labels() -> None:
    op.create_table(
        "labels",
        sa.Column("id", UUID, nullable=False, comment="UUIDv7."),
        sa.Column("fingerprint", sa.String(64), nullable=False,
            comment="Of what makes it the same statement, so that a file imported twice adds nothing."),
        sa.Column("sha256", sa.String(64), nullable=False, comment="Of the image's bytes."),
        sa.Column("label", sa.String(16), nullable=False, comment="real or fake."),
        sa.Column("generator", sa.Text(), comment="What made a fake one, if known."),
        sa.Column("collection", sa.Text(), comment="Where the image came from: a data set, a channel."),
        sa.Column("group", sa.Text(), comment="Record or post that the image belongs to, if any."),
        sa.Column("by", sa.Text(), nullable=False, comment="Who says so."),
        sa.Column("source", sa.Text(), nullable=False, comment="By which way: api, cli, file:NAME."),
        sa.Column("uri", sa.Text(), comment="Where the image was when it was labelled."),
        sa.Column("job_id", UUID, comment="Job it was labelled by, if any."),
        sa.Column("note", sa.Text(), nullable=False, comment="Free text."),
        sa.Column("at", TIME, nullable=False, comment="When it was said."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was written here."),
        sa.CheckConstraint("label IN ('real', 'fake')", name=op.f("ck_labels_label")),
        sa.CheckConstraint("label = 'fake' OR generator IS NULL", name=op.f("ck_labels_real_has_no_generator")),
        sa.PrimaryKeyConstraint("id", name="pk_labels"),
        sa.UniqueConstraint("fingerprint", name="uq_labels_fingerprint"),
        comment="Statements about images, append-only; a stated rule resolves those that contradict.",
    )
    op.create_index("ix_labels_created_at", "labels", ["created_at"])
    op.create_index("ix_labels_job_id", "labels", ["job_id"], **where("job_id IS NOT NULL"))
    op.create_index("ix_labels_sha256_id", "labels", ["sha256", "id"])


def create_imported_rows() -> None:
    op.create_table(
        "imported_rows",
        sa.Column("key", sa.String(64), nullable=False, comment="Of all that the row says."),
        sa.Column("sha256", sa.String(64), nullable=False, comment="Of the image's bytes."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was imported."),
        sa.PrimaryKeyConstraint("key", name="pk_imported_rows"),
        comment="Rows of label files, so that none is fetched again.",
    )
    op.create_index("ix_imported_rows_sha256", "imported_rows", ["sha256"])


def create_image_groups() -> None:
    op.create_table(
        "image_groups",
        sa.Column("id", sa.String(64), nullable=False, comment="HMAC-SHA256 of what it was made for."),
        sa.Column("joins", sa.String(64), comment="Group that this name stands for."),
        sa.Column("split", sa.String(16), nullable=False,
            comment="train, validation, holdout, or none: left out of all."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was decided."),
        sa.CheckConstraint("split IN ('train', 'validation', 'holdout', 'none')", name=op.f("ck_image_groups_split")),
        sa.PrimaryKeyConstraint("id", name="pk_image_groups"),
        comment="Which images are learned from, and which are only measured on.",
    )
    op.create_index("ix_image_groups_joins", "image_groups", ["joins"])


def create_kept_images() -> None:
    op.create_table(
        "kept_images",
        sa.Column("sha256", sa.String(64), nullable=False, comment="Of the bytes, and the copy's name."),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False, comment="Number of bytes."),
        sa.Column("format", sa.String(16), comment="Image format by content."),
        sa.Column("width", sa.Integer(), comment="Pixels."),
        sa.Column("height", sa.Integer(), comment="Pixels."),
        sa.Column("uri", sa.Text(), nullable=False, comment="Where it was read first."),
        sa.Column("phash", sa.String(16),
            comment="Perceptual hash in hexadecimal; null: not computed, or it cannot be decoded."),
        sa.Column("band_0", sa.Integer(), comment="First 16 bits of the hash, for finding near ones."),
        sa.Column("band_1", sa.Integer(), comment="The next 16."),
        sa.Column("band_2", sa.Integer(), comment="The next 16."),
        sa.Column("band_3", sa.Integer(), comment="The last 16."),
        sa.Column("group_id", sa.String(64),
            comment="Its group; null: nothing was said of it yet."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was kept."),
        sa.PrimaryKeyConstraint("sha256", name="pk_kept_images"),
        comment="Copies in the dataset storage; source objects vanish.",
    )
    op.create_index("ix_kept_images_band_0", "kept_images", ["band_0"])
    op.create_index("ix_kept_images_band_1", "kept_images", ["band_1"])
    op.create_index("ix_kept_images_band_2", "kept_images", ["band_2"])
    op.create_index("ix_kept_images_band_3", "kept_images", ["band_3"])
    op.create_index("ix_kept_images_created_at", "kept_images", ["created_at"])
    op.create_index("ix_kept_images_group_id_sha256", "kept_images", ["group_id", "sha256"])
    op.create_index("ix_kept_images_phash_group_id", "kept_images", ["phash", "group_id"])


def create_image_origins() -> None:
    op.create_table(
        "image_origins",
        sa.Column("sha256", sa.String(64), nullable=False, comment="Of the image's bytes."),
        sa.Column("job_id", UUID, nullable=False, comment="The job that judged it."),
        sa.Column("tenant", sa.Text(), comment="The job's."),
        sa.Column("accepted_at", TIME, nullable=False, comment="When the job was accepted."),
        sa.PrimaryKeyConstraint("sha256", "job_id", name="pk_image_origins"),
        comment="Whose image it was, once retention took the job and while something of the image is kept.",
    )
    op.create_index("ix_image_origins_accepted_at", "image_origins", ["accepted_at"])
    op.create_index("ix_image_origins_job_id", "image_origins", ["job_id"])
    op.create_index("ix_image_origins_tenant", "image_origins", ["tenant"], **where("tenant IS NOT NULL"))


def create_copies_to_drop() -> None:
    op.create_table(
        "copies_to_drop",
        sa.Column("sha256", sa.String(64), nullable=False, comment="Of the bytes, and the copy's name."),
        sa.Column("created_at", TIME, nullable=False, comment="When its row went."),
        sa.PrimaryKeyConstraint("sha256", name="pk_copies_to_drop"),
        comment="Copies in the dataset storage that are about to be deleted.",
    )


def create_secrets() -> None:
    op.create_table(
        "secrets",
        sa.Column("name", sa.Text(), nullable=False, comment="What it is for."),
        sa.Column("value", sa.LargeBinary(), nullable=False, comment="Random bytes; never shown."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was made."),
        sa.PrimaryKeyConstraint("name", name="pk_secrets"),
        comment="Secrets of this installation, such as the one that decides the hold-out.",
    )


def create_snapshots() -> None:
    op.create_table(
        "snapshots",
        sa.Column("id", UUID, nullable=False, comment="UUIDv7."),
        sa.Column("digest", sa.String(64), nullable=False,
            comment="Of the members; equal digests are equal snapshots."),
        sa.Column("rule", sa.Text(), nullable=False, comment="How contradicting labels were resolved."),
        sa.Column("counts", JSON_OBJECT, nullable=False, comment="Members by split, label and generator."),
        sa.Column("members", sa.LargeBinary(), nullable=False, comment="zlib of JSON lines, sorted by content hash."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was taken."),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
        comment="What a run was trained and measured on.",
    )


def create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", UUID, nullable=False, comment="UUIDv7."),
        sa.Column("kind", sa.String(16), nullable=False, comment="retrain or refit."),
        sa.Column("state", sa.String(16), nullable=False, comment="running, promoted, rejected, failed or skipped."),
        sa.Column("stage", sa.Text(), nullable=False, comment="What it does now, or did last."),
        sa.Column("by", sa.Text(), nullable=False,
            comment="Who started it; the schedule's name and slot if nobody did."),
        sa.Column("attempts", sa.Integer(), nullable=False, comment="Processes that worked on it."),
        sa.Column("owner", sa.Text(), comment="Process that works on it now."),
        sa.Column("token", sa.Integer(), nullable=False,
            comment="Fencing token: one more for every process that takes it."),
        sa.Column("config", JSON_OBJECT, nullable=False, comment="Training settings when it began."),
        sa.Column("snapshot_id", UUID, comment="What it learned from."),
        sa.Column("base_release", sa.Text(), comment="Champion when it began."),
        sa.Column("candidate", sa.Text(), comment="Release it made, if it came so far."),
        sa.Column("reasons", JSON_OBJECT, nullable=False, comment="Why it ended as it did."),
        sa.Column("report", JSON_OBJECT, nullable=False, comment="Gate and evaluation."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was started."),
        sa.Column("heartbeat_at", TIME, nullable=False, comment="Last sign of life."),
        sa.Column("finished_at", TIME, comment="When it ended."),
        sa.CheckConstraint("(state = 'running') = (finished_at IS NULL)", name=op.f("ck_runs_finished")),
        sa.CheckConstraint("kind IN ('retrain', 'refit')", name=op.f("ck_runs_kind")),
        sa.CheckConstraint("state IN ('running', 'promoted', 'rejected', 'failed', 'skipped')",
            name=op.f("ck_runs_state")),
        sa.ForeignKeyConstraint(["snapshot_id"], ["snapshots.id"], name="fk_runs_snapshot_id"),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        comment="Retrains and refits.",
    )
    op.create_index("ix_runs_created_at", "runs", ["created_at"])
    op.create_index("uq_runs_running", "runs", ["state"], unique=True, **where("state = 'running'"))


def create_run_metrics() -> None:
    op.create_table(
        "run_metrics",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False, comment="Order."),
        sa.Column("run_id", UUID, nullable=False, comment="The run."),
        sa.Column("epoch", sa.Integer(), nullable=False, comment="From 1."),
        sa.Column("step", sa.Integer(), nullable=False, comment="Optimiser steps done."),
        sa.Column("metrics", JSON_OBJECT, nullable=False, comment="Name to number."),
        sa.Column("created_at", TIME, nullable=False, comment="When."),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_run_metrics_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_run_metrics"),
        sa.UniqueConstraint("run_id", "step", name="uq_run_metrics_run_id_step"),
        comment="Curves of training runs.",
    )


def create_gate_comparisons() -> None:
    op.create_table(
        "gate_comparisons",
        sa.Column("run_id", UUID, nullable=False, comment="Run."),
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


def create_schedule_slots() -> None:
    op.create_table(
        "schedule_slots",
        sa.Column("name", sa.Text(), nullable=False, comment="Schedule, such as retrain."),
        sa.Column("slot", TIME, nullable=False, comment="When it was due."),
        sa.Column("run_id", UUID, comment="Run that it started, if any."),
        sa.Column("outcome", sa.Text(), nullable=False, comment="started, resumed, or why not."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was taken."),
        sa.PrimaryKeyConstraint("name", "slot", name="pk_schedule_slots"),
        comment="Times at which schedules fired.",
    )


def create_shadow_scores() -> None:
    op.create_table(
        "shadow_scores",
        sa.Column("id", UUID, nullable=False, comment="UUIDv7."),
        sa.Column("job_id", UUID, nullable=False, comment="The job."),
        sa.Column("revision", sa.Integer(), nullable=False, comment="Of the champion's verdict."),
        sa.Column("sha256", sa.String(64), nullable=False, comment="Of the bytes that were judged."),
        sa.Column("release", sa.Text(), nullable=False, comment="The challenger."),
        sa.Column("head", sa.Text(), nullable=False, comment="Its head."),
        sa.Column("score", sa.Double(), nullable=False, comment="0 to 1, higher = more likely generated."),
        sa.Column("label", sa.String(16), nullable=False, comment="What it would have said."),
        sa.Column("champion", sa.Text(), nullable=False, comment="Release that judged."),
        sa.Column("champion_head", sa.Text(), nullable=False, comment="Its head."),
        sa.Column("champion_score", sa.Double(), nullable=False, comment="Its score."),
        sa.Column("champion_label", sa.String(16), nullable=False, comment="Its label."),
        sa.Column("tenant", sa.Text(), comment="The job's."),
        sa.Column("content_type", sa.Text(), comment="The job's."),
        sa.Column("created_at", TIME, nullable=False, comment="When."),
        sa.PrimaryKeyConstraint("id", name="pk_shadow_scores"),
        sa.UniqueConstraint("job_id", "revision", "release", name="uq_shadow_scores_job_id_revision_release"),
        comment="Challenger beside champion on live traffic.",
    )
    op.create_index("ix_shadow_scores_release_id", "shadow_scores", ["release", "id"])


def create_erasures() -> None:
    op.create_table(
        "erasures",
        sa.Column("id", UUID, nullable=False, comment="UUIDv7."),
        sa.Column("state", sa.String(16), nullable=False, comment="running or done."),
        sa.Column("scope", sa.Text(), nullable=False, comment="job, sha256, tenant, or before and the day."),
        sa.Column("by", sa.Text(), nullable=False, comment="Who asked for it."),
        sa.Column("why", sa.Text(), nullable=False, comment="Why."),
        sa.Column("target", JSON_OBJECT, comment="The scope with what it names; null once finished."),
        sa.Column("step", sa.Text(), nullable=False, server_default="jobs", comment="What is erased now."),
        sa.Column("salt", sa.String(64), nullable=False, comment="Of the digests that say what was erased."),
        sa.Column("counts", JSON_OBJECT, nullable=False, comment="What was erased, by kind."),
        sa.Column("releases", JSON_OBJECT, nullable=False,
            comment="Releases that learned from it, directly or by descent, and what became of their files."),
        sa.Column("runs", JSON_OBJECT, nullable=False, comment="Runs whose directories must go, on every machine."),
        sa.Column("learned", sa.Boolean(), nullable=False, server_default=sa.false(),
            comment="Whether it names runs or releases."),
        sa.Column("last_look", JSON_OBJECT,
            comment="What the look over all tables and the storage found at the end."),
        sa.Column("created_at", TIME, nullable=False, comment="When it was begun."),
        sa.Column("finished_at", TIME, comment="When nothing was left."),
        sa.CheckConstraint("(state = 'done') = (finished_at IS NOT NULL)", name=op.f("ck_erasures_finished")),
        sa.CheckConstraint("state IN ('running', 'done')", name=op.f("ck_erasures_state")),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
        comment="Receipts of erasures.",
    )
    op.create_index("ix_erasures_finished_at", "erasures", ["finished_at"])
    op.create_index("ix_erasures_learned", "erasures", ["id"], **where("learned"))
    op.create_index("ix_erasures_running", "erasures", ["id"], **where("state = 'running'"))


def create_erasure_targets() -> None:
    op.create_table(
        "erasure_targets",
        sa.Column("erasure_id", UUID, nullable=False, comment="The erasure."),
        sa.Column("kind", sa.String(8), nullable=False,
            comment="job, image, erased (an image whose rows are gone) or uri."),
        sa.Column("value", sa.String(64), nullable=False, comment="Job's id, content hash, or digest of an address."),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasures.id"], name="fk_erasure_targets_erasure_id"),
        sa.PrimaryKeyConstraint("erasure_id", "kind", "value", name="pk_erasure_targets"),
        comment="What an erasure under way must erase, so that a crash loses none of it.",
    )


def create_erased_digests() -> None:
    op.create_table(
        "erased_digests",
        sa.Column("erasure_id", UUID, nullable=False, comment="The erasure."),
        sa.Column("digest", sa.String(64), nullable=False,
            comment="HMAC-SHA256 of kind and value under the erasure's salt."),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasures.id"], name="fk_erased_digests_erasure_id"),
        sa.PrimaryKeyConstraint("erasure_id", "digest", name="pk_erased_digests"),
        comment="What was erased, as nobody can read it back.",
    )


def create_audit() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", BIG_KEY, autoincrement=False, nullable=False, comment="From 1, without gaps."),
        sa.Column("at", TIME, nullable=False, comment="When, by the database's clock."),
        sa.Column("actor", sa.Text(), nullable=False, comment="Who did it."),
        sa.Column("action", sa.Text(), nullable=False, comment="What was done: release.promote, label.add, …"),
        sa.Column("subject", sa.Text(), nullable=False, comment="To what: an id or a name, never a content hash."),
        sa.Column("details", sa.Text(), nullable=False, comment="JSON object, byte for byte as it was hashed."),
        sa.Column("previous", sa.String(64), nullable=False, comment="Hash of the entry before."),
        sa.Column("hash", sa.String(64), nullable=False, comment="sha256 of all the other columns."),
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
        sa.ForeignKeyConstraint(["closed"], ["removals.audit_seq"],
            name="fk_removals_closed", deferrable=True, initially="DEFERRED"),
        sa.PrimaryKeyConstraint("audit_seq", name="pk_removals"),
        comment="Never has rows outside a transaction: while one is there, tables of record may lose rows.",
    )
