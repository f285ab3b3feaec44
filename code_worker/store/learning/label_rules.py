"""The rules of the labelled images: how contradicting labels become one, and how groups are split, with a secret."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, Protocol, TypeVar, get_args

REVIEW: Final = "review"
"""Source of a statement by which a reviewer settles an image under any rule."""


@dataclass(frozen=True, slots=True)
class Said:
    """The part of a label that a rule looks at; `at` is when it was said, `created_at` when it was written here."""

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
        """Returns what is said."""
        return self.label, self.generator, self.collection


@dataclass(frozen=True, slots=True)
class ResolvedLabel:
    """The one label of an image.

    Attributes:
        sha256: of the image's bytes.
        label: `real` or `fake`.
        generator: what made a fake one, as the deciding statement says, or else the last that agrees with it.
        collection: where the image came from, by the same statement.
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


def _latest(said: Sequence[Said], _trusted: Sequence[str]) -> Said | None:
    return said[-1]


def _majority(said: Sequence[Said], _trusted: Sequence[str]) -> Said | None:
    # A tie decides nothing: `most_common` would put the label first that happens to be met first.
    (first, most), *others = Counter(one.label for one in said).most_common()
    if others and others[0][1] == most:
        return None
    return next(one for one in reversed(said) if one.label == first)


def _unanimous(said: Sequence[Said], _trusted: Sequence[str]) -> Said | None:
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


Split = Literal["train", "validation", "holdout"]
"""`train` is learned from, `validation` chooses among what was learned, `holdout` is what the gate asks."""

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
HOLDOUT_SHARE: Final = 0.2
VALIDATION_SHARE: Final = 0.125
"""Of what is not held out: a tenth of all."""

# Changing one of these would let a later release learn from what an earlier one was measured on.
_HOLDOUT_PURPOSE: Final = b"code_worker hold-out 2\0"
_VALIDATION_PURPOSE: Final = b"code_worker validation 1\0"
_HOLDOUT_BORDER: Final = 2**64 // 5
_VALIDATION_BORDER: Final = 2**64 // 8
_SECRET_BYTES: Final = 32


def split_of(group: str, secret: bytes) -> Split:
    """The part that a new group of images belongs to: of all groups a fifth is held out, a tenth is for validation.

    HMAC-SHA256 (RFC 2104) of the group's key: without the secret nobody can tell the part of a group that they have
    not seen.

    Args:
        group: the group's key.
        secret: of the installation, at least 32 random bytes.
    """
    # Assumes that an HMAC's first 64 bits are uniform over groups and independent between purposes: a fifth is the
    # expectation, and the share of few groups strays from it (binomially) by sqrt(0.16 / n).
    if _number(secret, _HOLDOUT_PURPOSE, group) < _HOLDOUT_BORDER:
        return "holdout"
    # Of the rest an eighth is for validation, by a hash of its own: knowing this part says nothing of the other.
    return "validation" if _number(secret, _VALIDATION_PURPOSE, group) < _VALIDATION_BORDER else "train"


def keyed_digest(secret: bytes, purpose: bytes, text: str) -> bytes:
    """HMAC-SHA256 of a text for one purpose, so that what is learned of one tells nothing of another.

    Raises:
        ValueError: the secret is so short that it could be guessed.
    """
    if len(secret) < _SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, at least {_SECRET_BYTES} are needed")
    # Each purpose ends with a NUL, so that no text can make one purpose into another.
    return hmac.digest(secret, purpose + text.encode(), "sha256")


def _number(secret: bytes, purpose: bytes, group: str) -> int:
    return int.from_bytes(keyed_digest(secret, purpose, group)[:8], "big")
