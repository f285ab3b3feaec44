"""The elements of every form of data set: labelled images, names of generators, and how bytes are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from code_worker.errors import DatasetError
from code_worker.images.listing import LFS_POINTER
from code_worker.system.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from code_worker.images.listing import LeftOut
    from code_worker.images.source import Sources
    from code_worker.settings import Settings

REAL: Final = 0
FAKE: Final = 1
UNNAMED: Final = "(unnamed)"
"""Group of images of which nobody said what made them, or where they came from; no generator is called so."""


def group_of(label: int, generator: str | None) -> str:
    """Returns the group of images that an image is counted in: `real`, its generator, or `UNNAMED`.

    No generator can be labelled `real`, so the names are distinct.
    """
    return "real" if label == REAL else generator or UNNAMED


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


def pin_of(examples: Iterable[Example]) -> str:
    """Hash of a data set: of the content hash and label of every image, in any order and place."""
    lines = sorted(f"{one.sha256} {one.label}" for one in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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
        """True if an image may be missing."""
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


PUBLISHED_GENERATORS: Final = ("deepfloyd-if", "sd-1.4", "sd-2.1", "sd-xl")
"""D³'s gen_0 to gen_3, where a record does not say otherwise in its `model_gen*` fields."""
PUBLISHED_VARIANTS: Final = ("augm", "no_augm")
"""The two forms of D³'s test set, in the order in which they are published."""

_LABELS: Final[Mapping[str, int]] = {"0": REAL, "real": REAL, "1": FAKE, "fake": FAKE, "generated": FAKE}
_SD_XL: Final = re.compile(r"(?:stable-diffusion-xl|sd-?xl)(?:-base)?(?:-1\.0)?")
_SD: Final = re.compile(r"(?:stable-diffusion|sd)-?v?(\d)[-.](\d)(?:-base)?")


def numbered_generator(number: int) -> str:
    """Generator of D³'s column or member `gen_N`; `gen_N` itself beyond the published four."""
    return PUBLISHED_GENERATORS[number] if number < len(PUBLISHED_GENERATORS) else f"gen_{number}"


def generator_slug(model: str) -> str | None:
    """One spelling for a model that is named in several: `CompVis/stable-diffusion-v1-4` is `sd-1.4`.

    A model that is not one of D³'s keeps the last part of its name, in lower case; None if nothing is left of it.
    """
    slug = re.sub(r"[^a-z0-9.]+", "-", model.rstrip("/").rpartition("/")[2].lower()).strip("-.")
    if "deepfloyd" in model.lower():
        return PUBLISHED_GENERATORS[0]
    if _SD_XL.fullmatch(slug):
        return PUBLISHED_GENERATORS[3]
    if match := _SD.fullmatch(slug):
        return f"sd-{match[1]}.{match[2]}"
    return slug or None


def label_of(value: object) -> int:
    """Label that a word or number of a data set stands for: real or 0, fake, generated or 1.

    Raises:
        ValueError: it is something else.
    """
    # True and 1.0 would pass for 1, and a score of 0.0 for a label.
    label = None if isinstance(value, float | bool) else _LABELS.get(str(value).strip().lower())
    if label is None:
        raise ValueError(f"label is {str(value)[:40]!r}; it must be real (or 0) or fake (or 1)")
    return label


def allow(settings: Settings, root: Path) -> Settings:
    """The settings, with a directory that the caller named allowed to be read: who names it may read it anyway."""
    files = settings.files.model_copy(update={"roots": (*settings.files.roots, root)})
    return settings.model_copy(update={"files": files})


def disguise(head: bytes) -> str | None:
    """Returns what a file is that has another content than its name promises, by its first bytes; and what to do."""
    if head.startswith(LFS_POINTER):
        return "it is a Git LFS pointer: `git lfs pull` fetches the file"
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip: unpack it first"
    if head.startswith(b"PK\3\4"):
        return "it is a zip archive or a spreadsheet: unpack it, or save it as CSV"
    return None


def check_hash(data: bytes, sha256: str | None, key: str) -> bytes:
    """The bytes, unless a hash was promised that is not theirs.

    Raises:
        DatasetError: they are others.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DatasetError(f"{key}: the bytes are not those of sha256 {sha256[:12]}…, which its data set names")
    return data


def not_images(place: str, left_out: LeftOut) -> Iterator[Skipped]:
    """One entry for each reason for which files of a place were passed over; they are named from there on."""
    start = place.rstrip("/") + "/"
    for reason, files, names in left_out.passed_over:
        some = tuple(printable(name.removeprefix(start)) for name in names)
        yield Skipped(printable(place), reason, files, some)


@dataclass(frozen=True, slots=True)
class FromSource:
    """Fetches a URI or path each time it is called; raises as `Sources.fetch` does, or as `check_hash`."""

    sources: Sources
    uri: str
    sha256: str | None = None

    def __call__(self) -> bytes:
        """The bytes."""
        return check_hash(self.sources.fetch(self.uri).data, self.sha256, self.uri)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of a stream, which cannot be read a second time."""

    data: bytes = field(repr=False)

    def __call__(self) -> bytes:
        """The bytes."""
        return self.data
