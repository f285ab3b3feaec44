"""The labelled images as a data set, and which of them may be learned from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

from code_worker.data.datasets.examples import FAKE, REAL, Example, Skipped
from code_worker.errors import TrainingError

if TYPE_CHECKING:
    from code_worker.data.kept_copies import KeptImages
    from code_worker.settings import LabelSettings
    from code_worker.store.engine import Session, Store
    from code_worker.store.learning.image_groups import Place
    from code_worker.store.learning.label_rules import ResolvedLabel, Split
    from code_worker.store.learning.labels import Conflict


class Placed(Protocol):
    """An image and the part that was recorded for it."""

    @property
    def sha256(self) -> str:
        """Of the image's bytes, 64 hexadecimal digits."""

    @property
    def split(self) -> Split:
        """The part that the snapshot recorded."""


def refuse_holdout(items: Iterable[Placed]) -> None:
    """The last check before anything is learned.

    Raises:
        TrainingError: one of the images belongs to the hold-out.
    """
    for item in items:
        if item.split == "holdout":
            raise TrainingError(f"image {item.sha256} belongs to the hold-out and must never be learned from")


LABELS = "labels:"
"""What the labelled store is called where a data set is asked for."""
HOLDOUT = "holdout:"
"""What the part of it is called that is never learned from."""


def labelled_examples(
    store: Store, kept: KeptImages, rule: LabelSettings, *, skipped: list[Skipped], holdout: bool = False
) -> Iterator[Example]:
    """Images of the labelled store, by content hash; those of one group have the same `group`.

    Args:
        store: The ledger; asked once, in one transaction.
        kept: Copies of the images.
        rule: How contradicting labels are resolved.
        skipped: Takes images whose labels the rule leaves undecided.
        holdout: Only those of the hold-out.
    """
    from code_worker.store.learning import image_groups
    from code_worker.store.learning import labels as table

    def read(session: Session) -> tuple[list[ResolvedLabel], list[Conflict], Mapping[str, Place]]:
        decided = table.resolve(session, rule=rule.rule, trusted=rule.trusted, ignored=rule.ignored)
        disputed = table.conflicts(session, ignored=rule.ignored)
        return decided, disputed, image_groups.places(session, (one.sha256 for one in decided))

    decided, disputed, places = store.run(read, write=False)
    known = {label.sha256 for label in decided}
    reason = f"its labels contradict each other, and the rule {rule.rule!r} leaves it out"
    skipped.extend(Skipped(conflict.sha256, reason) for conflict in disputed if conflict.sha256 not in known)
    for label in decided:
        place = places.get(label.sha256)
        # An image of which the copy is gone is in no part: nothing says that it was never learned from.
        if holdout and (place is None or place.split != "holdout"):
            continue
        yield Example(
            key=label.sha256,
            label=FAKE if label.label == "fake" else REAL,
            read=partial(kept.read, label.sha256),
            generator=label.generator,
            collection=label.collection,
            group=None if place is None else place.group,
            sha256=label.sha256,
        )
