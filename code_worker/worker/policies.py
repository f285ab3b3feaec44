"""Putting thresholds in force: by operators alone, and audited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from code_worker.roles import Role, require
from code_worker.store import policies

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.store.policies import PolicyRow

__all__ = ["put_policy"]


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
        lambda session: policies.put(
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
