"""What every form of data set yields: one labelled image at a time, its bytes read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

__all__ = ["FAKE", "REAL", "Example", "Skipped", "losses", "passed_over"]

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
    """A record that could not be used, and why; or files that are no images, which nobody misses.

    Attributes:
        key: what a person finds it by; of passed-over files the place that they are in.
        reason: why.
        files: how many were passed over for this reason; 0: this is one record or place that may hold images.
        some: the first of these files by name.
    """

    key: str
    reason: str
    files: int = 0
    some: tuple[str, ...] = ()

    @property
    def is_loss(self) -> bool:
        """Whether an image may be missing."""
        return not self.files

    def __str__(self) -> str:
        if self.is_loss:
            return f"skipped {self.key}: {self.reason}"
        names = ", ".join(self.some) + (", …" if self.files > len(self.some) else "")
        count = "1 file" if self.files == 1 else f"{self.files} files"
        return f"passed over {count} in {self.key} ({self.reason}): {names}"


def losses(skipped: Iterable[Skipped]) -> list[dict[str, Any]]:
    """Records and places that could not be used, as reports have them."""
    return [{"key": one.key, "reason": one.reason} for one in skipped if one.is_loss]


def passed_over(skipped: Iterable[Skipped]) -> list[dict[str, Any]]:
    """Files that are no images, as reports have them: place, reason, how many, and the first of them."""
    return [asdict(one) for one in skipped if not one.is_loss]
