"""The golden set: images that no label of the store can change, pinned by hash, on which nothing may get worse."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from code_worker.data.open import open_examples
from code_worker.errors import ConfigurationError, TrainingError
from code_worker.images.phash import perceptual_hash
from code_worker.store import kept_images

if TYPE_CHECKING:
    from code_worker.data.examples import Example, Skipped
    from code_worker.settings import LimitSettings, Settings
    from code_worker.store.engine import Store
    from code_worker.store.kept_images import KeptImage
    from code_worker.training.snapshot import Snapshot

__all__ = ["GoldenSet", "load_golden", "pin_of", "read_golden", "without_golden"]


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """Its images with their content hashes, and the hash of all of it."""

    examples: tuple[Example, ...]
    digest: str

    @property
    def hashes(self) -> frozenset[str]:
        """Content hashes of its images: none of them may be learned from."""
        return frozenset(one.sha256 or "" for one in self.examples)

    def near(self, images: Iterable[KeptImage], limits: LimitSettings) -> set[str]:
        """Content hashes of those that are near-duplicates of its images, by their perceptual hashes.

        Raises:
            TransientError: no memory is left to decode one of its images in.
        """
        own = {one for example in self.examples if (one := perceptual_hash(example.read(), limits)) is not None}
        looks = {image.sha256: int(image.phash, 16) for image in images if image.phash is not None}
        theirs = np.fromiter(looks.values(), np.uint64, len(looks))  # (images,)
        found = np.zeros(len(looks), dtype=np.bool_)
        for one in own:
            found |= np.bitwise_count(theirs ^ np.uint64(one)) <= kept_images.NEAR_BITS
        return {sha256 for sha256, is_near in zip(looks, found, strict=True) if is_near}


def pin_of(examples: Iterable[Example]) -> str:
    """Hash of a data set: of the content hash and label of every image, in whatever order and place they lie."""
    lines = sorted(f"{one.sha256} {one.label}" for one in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_golden(source: str, settings: Settings) -> GoldenSet:
    """Reads every image of a data set and hashes it.

    Raises:
        DatasetError: it cannot be read.
        TrainingError: an image of it cannot be; half a golden set is none.
    """
    skipped: list[Skipped] = []
    found = [_hashed(one) for one in open_examples(source, settings=settings, skipped=skipped)]
    if lost := [one for one in skipped if one.is_loss]:
        raise TrainingError(
            f"golden set {source}: {len(lost)} images cannot be read, one of them {lost[0].key}: {lost[0].reason}"
        )
    return GoldenSet(tuple(found), pin_of(found))


def load_golden(settings: Settings) -> GoldenSet | None:
    """The golden set of the settings, compared with its pin; None where none is set.

    Raises:
        ConfigurationError: it is not pinned.
        TrainingError: it is not what was pinned.
        DatasetError: it cannot be read.
    """
    source, pin = settings.gate.golden, settings.gate.golden_sha256
    if source is None:
        return None
    if pin is None:
        raise ConfigurationError(
            f"the golden set {source} is not pinned: set CODE_WORKER_GATE__GOLDEN_SHA256 to what "
            f"`code-worker data pin {source}` prints"
        )
    golden = read_golden(source, settings)
    if golden.digest != pin.lower():
        raise TrainingError(
            f"the golden set {source} was changed: it is pinned as {pin[:16]}… and is {golden.digest[:16]}… now; "
            "put it back, or pin it anew if you meant it (`code-worker data pin`)"
        )
    return golden


def without_golden(taken: Snapshot, golden: GoldenSet, store: Store, limits: LimitSettings) -> Snapshot:
    """The snapshot without what the golden set holds and near-duplicates of it, whoever labelled them.

    Raises:
        TransientError: as `GoldenSet.near`.
    """
    hashes = [member.sha256 for member in taken.members]
    kept = store.run(partial(kept_images.kept, hashes=hashes), write=False)
    held = golden.hashes | golden.near(kept.values(), limits)
    stay = [member for member in taken.members if member.sha256 not in held]
    return taken.without("golden", stay, Counter(member.by for member in taken.members if member.sha256 in held))


def _hashed(example: Example) -> Example:
    data = example.read()
    return replace(example, sha256=hashlib.sha256(data).hexdigest(), read=partial(bytes, data))
