"""What a report says of the release it is about and of the data it was made on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from code_worker.data.examples import FAKE, REAL
from code_worker.training.evaluation.groups import UNNAMED

if TYPE_CHECKING:
    from code_worker.data.examples import Example, Skipped
    from code_worker.moderation.runtime import Runtime

__all__ = ["describe_data", "describe_release", "learned_lines", "nothing_usable"]


def describe_release(runtime: Runtime, heads: Sequence[str], *, toy: bool) -> dict[str, Any]:
    """Ids and hashes of what was measured."""
    return {
        "id": runtime.release,
        "manifest_sha256": runtime.manifest_sha256,
        "encoder_sha256": runtime.encoder_sha256,
        "precision": runtime.precision,
        "heads": {name: runtime.head_sha256.get(name) for name in heads},
        "default_head": runtime.default_head,
        "toy": toy,
    }


def describe_data(source: str, examples: Sequence[Example]) -> dict[str, Any]:
    """Counts, and a digest: equal digests are the same images with the same labels."""
    lines = sorted(f"{one.sha256} {one.label} {one.generator} {one.collection} {one.variant}\n" for one in examples)
    generators = Counter(one.generator or UNNAMED for one in examples if one.label == FAKE)
    collections = Counter(one.collection or UNNAMED for one in examples if one.label == REAL)
    return {
        "source": source,
        "digest": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "images": len(examples),
        "distinct": len({one.sha256 for one in examples}),
        "real": sum(one.label == REAL for one in examples),
        "fake": sum(one.label == FAKE for one in examples),
        "generators": dict(sorted(generators.items())),
        "collections": dict(sorted(collections.items())),
    }


def learned_lines(data: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What a report says of images that a release learned from: in passing, and in red."""
    if not (learned := data.get("learned")):
        return [], []
    said: list[str] = []
    warned: list[str] = []
    if count := learned["left_out"]:
        line = f"{count} images left out: a release, or one that it was trained from, learned from them"
        (warned if data["source"] == "holdout:" else said).append(line)
    if learned["unknown"]:
        warned.append(
            f"nothing here says what {' and '.join(learned['unknown'])} learned from (imported, or made elsewhere): "
            "these images may be among it, and figures on what was learned are too good"
        )
    return said, warned


def nothing_usable(source: str, skipped: Sequence[Skipped]) -> str:
    """Why there is nothing to measure on."""
    if not skipped:
        return f"{source or 'the data'} holds no labelled image"
    reasons = Counter(one.reason for one in skipped).most_common(3)
    said = "; ".join(f"{count} × {reason}" for reason, count in reasons)
    return f"{source or 'the data'}: none of {len(skipped)} images can be used: {said}"
