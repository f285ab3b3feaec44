"""The rule that splits labelled images into training, validation and hold-out: by group, with a secret."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final, Literal, get_args

__all__ = [
    "HOLDOUT_SHARE",
    "SPLITS",
    "VALIDATION_SHARE",
    "Split",
    "is_holdout",
    "keyed_digest",
    "recorded_split",
    "split_in_share",
    "split_of",
]

Split = Literal["train", "validation", "holdout"]
"""`train` is learned from, `validation` chooses among what was learned, `holdout` is what the gate asks."""

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
HOLDOUT_SHARE: Final = 0.2
VALIDATION_SHARE: Final = 0.125
"""Of what is not held out: a tenth of all."""

# Changing one of these would let a later release learn from what an earlier one was measured on.
_SALT: Final = b"code_worker hold-out 1\0"
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
    if _number(secret, _HOLDOUT_PURPOSE, group) < _HOLDOUT_BORDER:
        return "holdout"
    return split_in_share(group, secret)


def split_in_share(group: str, secret: bytes) -> Split:
    """The part of a group that is known not to be held out: `train` or, for an eighth of them, `validation`."""
    return "validation" if _number(secret, _VALIDATION_PURPOSE, group) < _VALIDATION_BORDER else "train"


def keyed_digest(secret: bytes, purpose: bytes, text: str) -> bytes:
    """HMAC-SHA256 of a text for one purpose, so that what is learned of one tells nothing of another.

    Raises:
        ValueError: the secret is so short that it could be guessed.
    """
    if len(secret) < _SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, at least {_SECRET_BYTES} are needed")
    return hmac.digest(secret, purpose + text.encode(), "sha256")


def _number(secret: bytes, purpose: bytes, group: str) -> int:
    return int.from_bytes(keyed_digest(secret, purpose, group)[:8], "big")


def is_holdout(sha256: str) -> bool:
    """The rule of releases before groups: a fifth of all images, by the hash of their bytes.

    It still tells the part of images that were labelled then, and of snapshots that did not record it.
    """
    digest = hashlib.sha256(_SALT + bytes.fromhex(sha256)).digest()
    return int.from_bytes(digest[:8], "big") < _HOLDOUT_BORDER


def recorded_split(sha256: str, split: Split | None) -> Split:
    """The part that was recorded; where none was, the one by the rule of releases before groups."""
    if split is not None:
        return split
    return "holdout" if is_holdout(sha256) else "train"
