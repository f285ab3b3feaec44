"""From a score to a label: thresholds per tenant and content type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from code_worker.types import Label


@dataclass(frozen=True, slots=True)
class Policy:
    """Thresholds in force for a tenant and content type; None means any.

    `score >= high` is fake, `score < low` is real, between the two is uncertain.
    """

    id: str
    low: float
    high: float
    head: str | None = None
    tenant: str | None = None
    content_type: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"policy {self.id}: thresholds must be 0 <= low <= high <= 1, not {self.low}, {self.high}"
            )

    def label(self, score: float) -> Label:
        """The label of a score in [0, 1]."""
        if score >= self.high:
            return Label.FAKE
        return Label.REAL if score < self.low else Label.UNCERTAIN


DEFAULT_POLICY = Policy(id="published", low=0.5, high=0.5)
"""The published decision: 0.5, never uncertain."""


class PolicyBook:
    """The policies in force at one moment; the most specific one applies."""

    def __init__(self, policies: Iterable[Policy] = ()) -> None:
        self._by_scope = {(policy.tenant, policy.content_type): policy for policy in policies}

    def find(self, tenant: str | None, content_type: str | None, otherwise: Policy = DEFAULT_POLICY) -> Policy:
        """Tenant and content type, else tenant, else content type, else the general one, else the release's own."""
        scopes = ((tenant, content_type), (tenant, None), (None, content_type), (None, None))
        return next((self._by_scope[scope] for scope in scopes if scope in self._by_scope), otherwise)
