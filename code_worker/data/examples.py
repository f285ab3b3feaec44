"""What every form of data set yields: one labelled image at a time, its bytes read only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["FAKE", "REAL", "Example", "Skipped"]

REAL: Final = 0
FAKE: Final = 1


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image.

    Attributes:
        key: what a person finds it by: a path, `shard.tar:member`, a content hash.
        label: 0 real, 1 generated.
        read: gives the file's bytes; raises DatasetError, ImageRejectedError or TransientError.
        generator: what made a generated one, if known; None for real ones.
        collection: where it came from (a data set, a directory, a channel); groups the real ones in reports.
        group: record whose images belong together (a real image and its generated siblings), if any.
        variant: transform that the data set itself applied, such as `augm` or `no_augm` of the D³ test set.
        sha256: of the bytes, where it is known without reading them.
    """

    key: str
    label: int
    read: Callable[[], bytes] = field(compare=False)
    generator: str | None = None
    collection: str | None = None
    group: str | None = None
    variant: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that could not be used, and why."""

    key: str
    reason: str
