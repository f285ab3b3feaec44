"""Heads that one release takes over from another as they are, and with them what they have learned."""

from __future__ import annotations

from sqlalchemy.orm import Session

from code_worker.errors import ArtifactError
from code_worker.store import erasures, personal, runs, snapshots
from code_worker.store.models import RunRow, db_now
from code_worker.store.sql import insert_into

__all__ = ["check", "note"]


def check(session: Session, base: str) -> None:
    """Makes sure that nothing is erased that heads of `base` learned from, and nothing will be in this transaction.

    To be asked before the first write.

    Raises:
        ArtifactError: an erasure is about to delete the files of `base`, or to find out that it must.
    """
    line = runs.ancestry(session, [base])
    taught = {run.snapshot_id or "" for made in line.values() for run in made}
    members = (snapshots.unpack(snapshots.members(session, one)) for one in sorted(taught))
    images = {row["sha256"] for rows in members for row in rows}
    if personal.left(session, images=images).images != images or base in erasures.releases_owed(session):
        raise ArtifactError(
            f"heads of {base} learned from what was erased, and must not be taken over: fit every head again with "
            "`code-worker refit`"
        )


def note(session: Session, release: str, *, run_id: str, base: str, by: str) -> None:
    """Records that a release has heads of another one: it learned what that one did. For whoever asked `check`.

    Nothing is recorded of a base that no run here made.
    """
    made = runs.ancestry(session, [base])[base]
    if not made:
        return
    row = {
        "id": run_id,
        "kind": "refit",
        "state": "skipped",
        "stage": "kept",
        "by": by,
        "attempts": 1,
        "token": 1,
        # As of a refit of some heads, here of none: the others are those of the base.
        "config": {"heads": {}},
        "snapshot_id": made[0].snapshot_id,
        "base_release": base,
        "candidate": release,
        "reasons": [f"nothing was fitted: {release} has the heads of {base} but one"],
        "report": {},
        "finished_at": db_now(),
    }
    session.execute(insert_into(session, RunRow).on_conflict_do_nothing().values(row))
