"""Thresholds: the most specific policy applies, and its borders are exact."""

from __future__ import annotations

import pytest

from code_worker.moderation.policy import DEFAULT_POLICY, Policy, PolicyBook
from code_worker.types import Label

BOOK = PolicyBook(
    [
        Policy("both", 0.1, 0.2, tenant="acme", content_type="avatar"),
        Policy("tenant", 0.1, 0.2, tenant="acme"),
        Policy("type", 0.1, 0.2, content_type="avatar"),
    ]
)


@pytest.mark.parametrize(
    ("tenant", "content_type", "expected"),
    [
        ("acme", "avatar", "both"),
        ("acme", "listing", "tenant"),
        ("acme", None, "tenant"),
        ("other", "avatar", "type"),
        (None, "avatar", "type"),
        ("other", "listing", "published"),
        (None, None, "published"),
    ],
)
def test_the_most_specific_policy_applies(tenant: str | None, content_type: str | None, expected: str) -> None:
    assert BOOK.find(tenant, content_type).id == expected


def test_borders_belong_to_the_upper_side() -> None:
    policy = Policy("p", 0.25, 0.75)
    assert [policy.label(score) for score in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1.0)] == [
        Label.REAL,
        Label.REAL,
        Label.UNCERTAIN,
        Label.UNCERTAIN,
        Label.FAKE,
        Label.FAKE,
    ]


def test_the_published_policy_is_never_uncertain() -> None:
    assert [DEFAULT_POLICY.label(score) for score in (0.0, 0.49999, 0.5, 1.0)] == [
        Label.REAL,
        Label.REAL,
        Label.FAKE,
        Label.FAKE,
    ]


@pytest.mark.parametrize(("low", "high"), [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_thresholds_out_of_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="0 <= low <= high <= 1"):
        Policy("p", low, high)
