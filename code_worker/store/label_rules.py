"""How contradicting statements about one image become one label, by a stated rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol, TypeVar

__all__ = ["REVIEW", "RULES", "ResolvedLabel", "Said", "latest_of_each", "resolve_image", "review_of"]

REVIEW: Final = "review"
"""Source of a statement by which a reviewer settles an image, whatever the rule."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a rule looks at of one statement; `at` is when it was said, `created_at` when it was written here."""

    sha256: str
    label: str
    generator: str | None
    collection: str | None
    by: str
    at: datetime
    created_at: datetime
    source: str = ""
    id: str = ""

    @property
    def content(self) -> tuple[str, str | None, str | None]:
        """What is said."""
        return self.label, self.generator, self.collection


@dataclass(frozen=True, slots=True)
class ResolvedLabel:
    """The one label of an image.

    Attributes:
        sha256: of the image's bytes.
        label: `real` or `fake`.
        generator: what made a fake one, as the deciding statement says, or else the last that agrees with it.
        collection: where the image came from, likewise.
        labellers: how many spoke of it.
        contradicted: whether their latest statements differ.
        last_at: when the latest of these was said.
        first_created_at: when the first statement of all was written here.
        by: whose statement decides.
    """

    sha256: str
    label: str
    generator: str | None
    collection: str | None
    labellers: int
    contradicted: bool
    last_at: datetime
    first_created_at: datetime
    by: str = ""


class _Spoken(Protocol):
    @property
    def by(self) -> str: ...

    @property
    def source(self) -> str: ...


S = TypeVar("S", bound=_Spoken)


def review_of(statements: Sequence[S]) -> S | None:
    """The last statement by which a reviewer settled the image, or None."""
    return next((said for said in reversed(statements) if said.source == REVIEW), None)


def latest_of_each(statements: Sequence[S]) -> list[S]:
    """The last statement of every labeller, in the order given."""
    last = {said.by: said for said in statements}
    return [said for said in statements if last[said.by] is said]


def _latest(said: Sequence[Said], trusted: Sequence[str]) -> Said | None:  # noqa: ARG001 - every rule's signature
    return said[-1]


def _majority(said: Sequence[Said], trusted: Sequence[str]) -> Said | None:  # noqa: ARG001 - as above
    (first, most), *others = Counter(one.label for one in said).most_common()
    if others and others[0][1] == most:
        return None
    return next(one for one in reversed(said) if one.label == first)


def _unanimous(said: Sequence[Said], trusted: Sequence[str]) -> Said | None:  # noqa: ARG001 - as above
    return said[-1] if len({one.label for one in said}) == 1 else None


def _trusted(said: Sequence[Said], trusted: Sequence[str]) -> Said | None:
    spoke = {one.by: one for one in said}
    return next((spoke[name] for name in trusted if name in spoke), said[-1])


RULES: Final[Mapping[str, Callable[[Sequence[Said], Sequence[str]], Said | None]]] = {
    "latest": _latest,
    "majority": _majority,
    "unanimous": _unanimous,
    "trusted": _trusted,
}
"""Name → which of the labellers' latest statements, in the order said, decides; None: none does."""


def resolve_image(statements: Sequence[Said], rule: str, trusted: Sequence[str] = ()) -> ResolvedLabel | None:
    """The label of one image, or None where the rule leaves it undecided; a reviewer's last word is above the rule.

    Args:
        statements: all that was said of it, in the order said; at least one.
        rule: a name in `RULES`.
        trusted: labellers by falling trust.

    Raises:
        ValueError: no such rule.
    """
    if (choose := RULES.get(rule)) is None:
        raise ValueError(f"{rule!r} is no rule for labels; rules are {', '.join(RULES)}")
    last = latest_of_each(statements)
    if (decides := review_of(statements) or choose(last, trusted)) is None:
        return None
    agreeing = [decides, *(one for one in reversed(last) if one.label == decides.label)]
    return ResolvedLabel(
        sha256=decides.sha256,
        label=decides.label,
        generator=next((one.generator for one in agreeing if one.generator), None),
        collection=next((one.collection for one in agreeing if one.collection), None),
        labellers=len(last),
        contradicted=any(one.label != decides.label for one in last),
        last_at=last[-1].at,
        first_created_at=min(one.created_at for one in statements),
        by=decides.by,
    )
