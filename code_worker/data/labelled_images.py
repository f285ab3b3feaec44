"""The labelled images as a data set, and which of them may be learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from code_worker.data.datasets.examples import FAKE, REAL, Example, Skipped
from code_worker.errors import DatasetError, StorageError, TrainingError
from code_worker.logs import get_logger
from code_worker.store.learning.label_rules import Split, recorded_split

if TYPE_CHECKING:
    from code_worker.data.kept_copies import KeptImages
    from code_worker.settings import LabelSettings, LimitSettings
    from code_worker.store.engine import Session, Store
    from code_worker.store.learning.image_groups import Place
    from code_worker.store.learning.label_rules import ResolvedLabel
    from code_worker.store.learning.labels import Conflict


class Placed(Protocol):
    """An image and the part that was recorded for it."""

    @property
    def sha256(self) -> str:
        """Of the image's bytes, 64 hexadecimal digits."""

    @property
    def split(self) -> Split | None:
        """The part that the snapshot recorded; None: by the rule of releases before groups."""


def refuse_holdout(items: Iterable[Placed]) -> None:
    """The last check before anything is learned.

    Raises:
        TrainingError: one of the images belongs to the hold-out.
    """
    for item in items:
        if recorded_split(item.sha256, item.split) == "holdout":
            raise TrainingError(f"image {item.sha256} belongs to the hold-out and must never be learned from")


LABELS = "labels:"
"""What the labelled store is called where a data set is asked for."""
HOLDOUT = "holdout:"
"""What the part of it is called that is never learned from."""
_PAGE: Final = 256
log = get_logger(__name__)


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
        if holdout and _part(label.sha256, place) != "holdout":
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


def _part(sha256: str, place: Place | None) -> str | None:
    return recorded_split(sha256, None) if place is None else place.split


def group_old_images(
    store: Store, kept: KeptImages, limits: LimitSettings, *, threads: int, check: Callable[[], None]
) -> None:
    """Puts images that were labelled before there were groups into groups, so that near-duplicates follow them.

    Each kept copy is read once, ever; one that is gone or cannot be decoded is in a group of its own.

    Args:
        store: The ledger; written to after every 256 images.
        kept: Copies of the images.
        limits: What an image may cost.
        threads: Images read and decoded at the same time.
        check: Called before each 256; what it raises ends the work, which goes on there the next time.

    Raises:
        StorageError: the storage cannot be read.
        TransientError: no memory is left to decode an image in.
    """
    from code_worker.images.phash import perceptual_hash
    from code_worker.store.learning import image_groups, kept_images

    def hashed(sha256: str) -> str | None:
        try:
            return kept_images.bits(perceptual_hash(kept.read(sha256), limits))
        except StorageError:
            raise
        except DatasetError:
            return None

    def write(session: Session, found: Mapping[str, str | None]) -> None:
        image_groups.lock(session)
        # Asked again: one may have been forgotten and labelled anew since it was listed.
        old = sorted(image_groups.labelled_before(session, found.keys()))
        for sha256 in old:
            kept_images.note_hash(session, sha256, found[sha256])
        image_groups.place(session, dict.fromkeys(old), old=old)

    count = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="group") as pool:
        while some := store.run(partial(image_groups.ungrouped, limit=_PAGE), write=False):
            check()
            # Threads read and decode, this one alone writes: one transaction at a time holds the lock of groups.
            store.run(partial(write, found=dict(zip(some, pool.map(hashed, some), strict=True))))
            count += len(some)
    if count:
        log.info("old_images_grouped", images=count)
