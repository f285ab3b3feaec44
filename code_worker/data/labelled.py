"""The labelled store as a data set: every image that the rule decides, read from its kept copy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from code_worker.data.examples import FAKE, REAL, Example, Skipped

if TYPE_CHECKING:
    from code_worker.data.kept import KeptImages
    from code_worker.settings import LabelSettings
    from code_worker.store.engine import Session, Store
    from code_worker.store.labels import Conflict, ResolvedLabel

__all__ = ["HOLDOUT", "LABELS", "labelled_examples"]

LABELS = "labels:"
"""What the labelled store is called where a data set is asked for."""
HOLDOUT = "holdout:"
"""What the part of it is called that is never learned from."""


def labelled_examples(
    store: Store, kept: KeptImages, rule: LabelSettings, *, skipped: list[Skipped]
) -> Iterator[Example]:
    """Images of the labelled store, by content hash.

    Args:
        store: The ledger; asked once, in one transaction.
        kept: Copies of the images.
        rule: How contradicting labels are resolved.
        skipped: Takes images whose labels the rule leaves undecided.
    """
    from code_worker.store import labels as table  # noqa: PLC0415 - SQLAlchemy: not for who reads files only

    def both(session: Session) -> tuple[list[ResolvedLabel], list[Conflict]]:
        decided = table.resolve(session, rule=rule.rule, trusted=rule.trusted, ignored=rule.ignored)
        return decided, table.conflicts(session)

    decided, disputed = store.run(both, write=False)
    known = {label.sha256 for label in decided}
    reason = f"its labels contradict each other, and the rule {rule.rule!r} leaves it out"
    skipped.extend(Skipped(conflict.sha256, reason) for conflict in disputed if conflict.sha256 not in known)
    for label in decided:
        yield Example(
            key=label.sha256,
            label=FAKE if label.label == "fake" else REAL,
            read=partial(kept.read, label.sha256),
            generator=label.generator,
            collection=label.collection,
            sha256=label.sha256,
        )
