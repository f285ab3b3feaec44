"""Policies: thresholds per tenant and content type, each change a new version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import RowMapping, func, literal, select
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.roles import Role, require
from code_worker.store import audit, releases
from code_worker.store.ids import as_uuid
from code_worker.store.models import PolicyRecord
from code_worker.store.sql import insert_into, new_id, table_of

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Store

_GOAL: Final = frozenset({"source", "max_fpr", "max_fnr"})
_POLICIES = table_of(PolicyRecord)


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One version of a policy; None as tenant or content type means every one. Verdicts carry its `id`.

    `release_id` is the release that it was calibrated on, None for thresholds that somebody set by hand.
    """

    id: str
    tenant: str | None
    content_type: str | None
    version: int
    head: str | None
    low: float
    high: float
    created_at: datetime
    created_by: str
    note: str
    evidence: Mapping[str, Any] | None = None
    release_id: str | None = None

    @property
    def scope(self) -> str:
        """Whose jobs it is for, in words."""
        whose = f"tenant {self.tenant}" if self.tenant else "every tenant"
        return f"{whose}, {self.content_type or 'every content type'}"


_COLUMNS = tuple(_POLICIES.c[name] for name in PolicyRow.__dataclass_fields__)


def put(
    session: Session,
    *,
    low: float,
    high: float,
    tenant: str | None = None,
    content_type: str | None = None,
    head: str | None = None,
    by: str,
    note: str = "",
    evidence: Mapping[str, Any] | None = None,
    release_id: str | None = None,
    policy_id: str | None = None,
) -> PolicyRow:
    """Puts thresholds in force for a tenant and content type, as the next version.

    Calibrated ones name the release. With a `policy_id` made outside the transaction, a repetition adds no version.

    Raises:
        ValueError: not 0 ≤ low ≤ high ≤ 1, or an empty name, which would mean every one.
        StoreError: somebody else put one at the same moment.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"thresholds must be 0 <= low <= high <= 1, not {low} and {high}")
    if "" in {tenant, content_type}:
        raise ValueError("tenant and content type must not be empty")
    if policy_id is not None and (before := get(session, policy_id)) is not None:
        return before
    scope = (_POLICIES.c.tenant == (tenant or ""), _POLICIES.c.content_type == (content_type or ""))
    last = session.scalar(select(func.max(_POLICIES.c.version)).where(*scope))
    row = {
        "id": policy_id or new_id(session),
        "tenant": tenant or "",
        "content_type": content_type or "",
        "version": (last or 0) + 1,
        "head": head,
        "low": low,
        "high": high,
        "created_by": by,
        "note": note,
        "evidence": None if evidence is None else dict(evidence),
        "release_id": release_id,
    }
    written = insert_into(session, PolicyRecord).on_conflict_do_nothing().values(row).returning(*_COLUMNS)
    if (made := session.execute(written).mappings().one_or_none()) is None:
        raise StoreError("the policy was changed by somebody else just now: look at it and try again")
    _audit(session, row)
    return _policy(made)


def _audit(session: Session, row: Mapping[str, Any]) -> None:
    details = {name: row[name] for name in ("tenant", "content_type", "version", "head", "low", "high", "release_id")}
    details["note"] = audit.blank(row["note"])
    audit.record(session, actor=row["created_by"], action="policy.put", subject=str(row["id"]), details=details)


def in_force(session: Session) -> list[PolicyRow]:
    """The highest version for every tenant and content type that has one."""
    # NOT EXISTS, since the unique constraint's index answers it for each row.
    newer = _POLICIES.alias("newer")
    superseded = select(literal(1)).where(
        newer.c.tenant == _POLICIES.c.tenant,
        newer.c.content_type == _POLICIES.c.content_type,
        newer.c.version > _POLICIES.c.version,
    )
    statement = select(*_COLUMNS).where(~superseded.exists()).order_by(_POLICIES.c.tenant, _POLICIES.c.content_type)
    return [_policy(row) for row in session.execute(statement).mappings()]


def history(session: Session, *, tenant: str | None = None, content_type: str | None = None) -> list[PolicyRow]:
    """All versions for exactly this tenant and content type, newest first."""
    statement = (
        select(*_COLUMNS)
        .where(_POLICIES.c.tenant == (tenant or ""), _POLICIES.c.content_type == (content_type or ""))
        .order_by(_POLICIES.c.version.desc())
    )
    return [_policy(row) for row in session.execute(statement).mappings()]


def get(session: Session, policy_id: str) -> PolicyRow | None:
    """The version that a verdict names, in force or superseded, or None."""
    if (known := as_uuid(policy_id)) is None:
        return None
    row = session.execute(select(*_COLUMNS).where(_POLICIES.c.id == known)).mappings().one_or_none()
    return None if row is None else _policy(row)


def stale(session: Session, release_id: str | None) -> list[PolicyRow]:
    """Policies in force that were calibrated on another release, whose scores mean something else; none for None.

    Thresholds fit a release with another id too, if it has the same encoder and the same files of the policy's head.
    """
    if release_id is None:
        return []
    drawn = [row for row in in_force(session) if row.release_id not in {None, release_id}]
    now = _manifest(session, release_id)
    return [row for row in drawn if not _scores_alike(row, _manifest(session, str(row.release_id)), now)]


def redrawable(session: Session, release_id: str | None) -> list[PolicyRow]:
    """Stale policies whose evidence says by what data and to what end they were drawn, so that they can be again."""
    return [row for row in stale(session, release_id) if {*(row.evidence or ())} >= _GOAL]


def _manifest(session: Session, release_id: str) -> Mapping[str, Any]:
    found = releases.get(session, release_id)
    return {} if found is None else found.manifest


def _scores_alike(row: PolicyRow, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    made, found = (_hashes(manifest, row.head) for manifest in (then, now))
    return None not in made and made == found


def _hashes(manifest: Mapping[str, Any], head: str | None) -> tuple[str | None, str | None]:
    """Of encoder and head: what a score depends on."""
    fitted = manifest.get("heads", {}).get(head or manifest.get("default_head"), {})
    return manifest.get("encoder", {}).get("sha256"), fitted.get("sha256")


def _policy(row: RowMapping) -> PolicyRow:
    # Before there was a column for it, the evidence alone said which release it was.
    drawn_on = row["release_id"] or (row["evidence"] or {}).get("release")
    # Empty in the table, and not NULL: the unique constraint would let in any number of rows with a NULL.
    scope = {name: row[name] or None for name in ("tenant", "content_type")}
    return PolicyRow(**{**row, **scope, "release_id": drawn_on})


def put_policy(
    settings: Settings,
    store: Store,
    *,
    by: str,
    low: float,
    high: float,
    tenant: str | None = None,
    content_type: str | None = None,
    head: str | None = None,
    note: str = "",
    evidence: Mapping[str, Any] | None = None,
    release_id: str | None = None,
) -> PolicyRow:
    """Puts thresholds in force as `store.policies.put` does.

    Raises:
        NotAllowedError: `by` is no operator.
        ValueError, StoreError: see there.
    """
    require(settings.roles, by, Role.OPERATOR, "set thresholds")
    policy_id = store.new_id()
    return store.run(
        lambda session: put(
            session,
            low=low,
            high=high,
            tenant=tenant,
            content_type=content_type,
            head=head,
            by=by,
            note=note,
            evidence=evidence,
            release_id=release_id,
            policy_id=policy_id,
        )
    )
