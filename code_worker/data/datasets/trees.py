"""Directories whose names are the labels: D³'s test tree, `0_real/1_fake` benchmarks, plain `real` and `fake`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker.data.datasets.examples import (
    FAKE,
    PUBLISHED_VARIANTS,
    REAL,
    Example,
    FromSource,
    Skipped,
    not_images,
    numbered_generator,
)
from code_worker.errors import DatasetError, ImageRejectedError, TransientError
from code_worker.images.listing import LeftOut
from code_worker.images.local_files import local_path
from code_worker.images.source import images_under
from code_worker.system.terminal import printable

if TYPE_CHECKING:
    from code_worker.images.source import Sources

_GEN: Final = re.compile(r"gen_?(\d{1,4})")
_VARIANTS: Final = frozenset(PUBLISHED_VARIANTS)
_SPLITS: Final = frozenset({"train", "val", "valid", "validation", "test"})
_RANKS: Final[tuple[dict[str, int], ...]] = (
    {"0_real": REAL, "1_fake": FAKE},
    {"real": REAL, "fake": FAKE},
    {"nature": REAL, "ai": FAKE},
)
"""A name of a former rank decides over those of a later one: `1_fake/nature/` holds generated landscapes."""

_UNLABELLED: Final = "no directory above it says what it is: real, fake, 0_real, 1_fake or gen_N"


@dataclass(frozen=True, slots=True)
class _Place:
    label: int
    generator: str | None
    collection: str
    group: str | None
    variant: str | None


def tree_examples(root: Path, sources: Sources, *, skipped: list[Skipped]) -> Iterator[Example]:
    """Images of a directory tree, each directory in the order of its names.

    What an image is, `images_under` says. A link to a file counts if it leads to where `sources` may read; a link to
    a directory is not followed, and listed.

    Args:
        root: The tree.
        sources: What reads the images.
        skipped: Takes images that no directory labels, directories that cannot be read, and at the end what was
            passed over.

    Raises:
        DatasetError: the tree cannot be listed.
    """
    base = root.resolve()
    for uri in _images(str(base), sources, skipped):
        path = local_path(uri)
        parts = Path(path).relative_to(base).parts
        yield from _example(base.name, parts, path, sources, skipped)


def bucket_examples(prefix: str, sources: Sources, *, skipped: list[Skipped]) -> Iterator[Example]:
    """Like `tree_examples`, of the objects under `s3://bucket/prefix/`.

    Raises:
        DatasetError: the prefix cannot be listed.
    """
    start = prefix.rstrip("/") + "/"
    for uri in _images(start, sources, skipped):
        name = uri.removesuffix("?versionId=")
        parts = tuple(part for part in name.removeprefix(start).split("/") if part)
        yield from _example(start.split("/")[-2], parts, uri, sources, skipped)


def _images(place: str, sources: Sources, skipped: list[Skipped]) -> Iterator[str]:
    left_out = LeftOut()
    try:
        yield from images_under(sources, place, left_out)
    except (ImageRejectedError, TransientError) as error:
        raise DatasetError(f"cannot list {place}: {error}") from error
    skipped.extend(Skipped(printable(lost), reason) for lost, reason in left_out.lost)
    skipped.extend(not_images(place, left_out))


def _example(
    root: str, parts: Sequence[str], uri: str, sources: Sources, skipped: list[Skipped]
) -> Iterator[Example]:
    key = printable(uri)
    place = _place(root, parts[:-1], parts[-1])
    if isinstance(place, str):
        skipped.append(Skipped(key, place))
        return
    yield Example(
        key=key,
        label=place.label,
        read=FromSource(sources, uri),
        generator=place.generator,
        collection=place.collection,
        group=place.group,
        variant=place.variant,
    )


def _place(root: str, directories: Sequence[str], name: str) -> _Place | str:
    """Returns what directories say of a file, or why they say nothing."""
    lower = [part.lower() for part in directories]
    labels = _labels(lower)
    # Somebody may point right at a directory `real` or `gen_2`.
    if not labels and (own := _labels([root.lower()])):
        labels = [(-1, own[0][1])]
    if not labels:
        return _UNLABELLED
    # Refused, and not decided by the nearest: a wrong label teaches, a missing image only lacks.
    if len({label for _, label in labels}) > 1:
        return "directories above it say both real and fake"
    at, label = labels[0]
    around = [part for part in (root.lower(), *lower) if part in _VARIANTS]
    before = [part for part in directories[: max(at, 0)] if part.lower() not in _VARIANTS | _SPLITS]
    after = [part for part in directories[at + 1 :] if part.lower() not in _VARIANTS | _SPLITS]
    mark = root.lower() if at < 0 else lower[at]
    return _Place(
        label=label,
        generator=_generator(mark, root, before, after) if label == FAKE else None,
        collection=printable(_collection(mark, root, before, after)),
        # D³'s siblings share a name.
        group="/".join((*before, *after, Path(name).stem)) if around or _GEN.fullmatch(mark) else None,
        variant=around[-1] if around else None,
    )


def _labels(directories: Sequence[str]) -> list[tuple[int, int]]:
    """Position and label of the directories that label, by the first rank that any of them belongs to."""
    numbered = [(at, FAKE) for at, part in enumerate(directories) if _GEN.fullmatch(part)]
    for rank, names in enumerate(_RANKS):
        found = [(at, names[part]) for at, part in enumerate(directories) if part in names]
        if rank == 1:
            found = sorted(found + numbered)
        if found:
            return found
    return []


def _generator(mark: str, root: str, before: Sequence[str], after: Sequence[str]) -> str | None:
    if match := _GEN.fullmatch(mark):
        return numbered_generator(int(match[1]))
    if mark == "fake" and after:
        inner = _GEN.fullmatch(after[0].lower())
        return numbered_generator(int(inner[1])) if inner else printable(after[0])
    if before:
        return printable(before[0])
    return None if mark == "fake" else printable(root)


def _collection(mark: str, root: str, before: Sequence[str], after: Sequence[str]) -> str:
    if mark == "real" and after:
        return after[0]
    return before[0] if before else root
