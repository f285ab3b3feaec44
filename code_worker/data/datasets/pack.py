"""Writes any data set as shards in the published form, so that it reads fast and travels as a few files."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

from code_worker.data.datasets.examples import PUBLISHED_GENERATORS, REAL, Example, Skipped
from code_worker.errors import (
    ConfigurationError,
    DatasetError,
    ImageRejectedError,
    SourceCredentialsError,
    StorageError,
    TransientError,
)
from code_worker.system.files import whole_directory

if TYPE_CHECKING:
    from code_worker.settings import LimitSettings
    from code_worker.types import ImageFacts

_SUFFIXES: Final = {"jpeg": "jpg", "tiff": "tif"}
_MOST_IN_RECORD: Final = 16
"""A record is in memory while it is written."""

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Packed:
    """Summary of the shards that were written."""

    images: int
    records: int
    shards: tuple[Path, ...]
    size_bytes: int


def bring_together(examples: Iterable[Example]) -> Iterator[Example]:
    """The same examples, those of one record side by side, records by their first image; holds all but the bytes."""
    records: dict[object, list[Example]] = {}
    for index, example in enumerate(examples):
        place = index if example.group is None else (example.group, example.variant)
        records.setdefault(place, []).append(example)
    return itertools.chain.from_iterable(records.values())


def pack(
    examples: Iterable[Example],
    out: Path,
    *,
    limits: LimitSettings,
    skipped: list[Skipped],
    shard_bytes: int = 512 << 20,
    on_image: Callable[[int], None] = lambda _: None,
) -> Packed:
    """Writes `out/shard-000000.tar` and so on; the directory appears whole, or not at all.

    Neighbours of one group become one record: `<key>.real.jpg`, `<key>.gen_0.jpg` and `<key>.json`, which says of
    each image its sha256, generator and collection, so that nothing is lost. A second real image of a group begins
    another record. The published generators keep their numbers, others count from 4. The same examples give the same
    bytes.

    Args:
        examples: What to pack; see `bring_together`.
        out: A directory that does not exist yet, or is empty.
        limits: Images beyond them are skipped, as are those whose header cannot be read.
        skipped: Takes images that cannot be read.
        shard_bytes: A shard ends before the record that would make it larger.
        on_image: Told 1 for each image written.

    Raises:
        ConfigurationError: `out` is not empty or cannot be written.
        DatasetError: not one image could be used, or the disk is full.
        StorageError, SourceCredentialsError: where images come from fails as a whole.
    """
    with _directory(out) as directory, _Shards(directory, shard_bytes) as shards:
        count = images = 0
        for record in _records(examples, limits, skipped):
            shards.add(record.members(count))
            count += 1
            images += len(record.images)
            on_image(len(record.images))
        if not count:
            raise DatasetError(f"nothing to pack: no usable image ({sum(one.is_loss for one in skipped)} skipped)")
    written = tuple(out / name for name in shards.names)
    return Packed(images, count, written, sum(path.stat().st_size for path in written))


@dataclass(slots=True)
class _Packing:
    """One record on its way into a shard."""

    group: str | None
    variant: str | None
    images: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def takes(self, example: Example) -> bool:
        """Returns whether the image belongs to this record and finds room in it."""
        if example.group is None or (example.group, example.variant) != (self.group, self.variant):
            return False
        return len(self.images) < _MOST_IN_RECORD and not (example.label == REAL and "real" in self.images)

    def add(self, example: Example, data: bytes, facts: ImageFacts) -> None:
        kind = facts.format or ""
        slot = "real" if example.label == REAL else self._free_slot(example.generator)
        self.images[slot] = (_SUFFIXES.get(kind, kind), data)
        self.facts[slot] = {
            "sha256": facts.sha256,
            "generator": example.generator,
            "collection": example.collection,
        }

    def _free_slot(self, generator: str | None) -> str:
        if generator in PUBLISHED_GENERATORS:
            slot = f"gen_{PUBLISHED_GENERATORS.index(generator)}"
            if slot not in self.images:
                return slot
        numbers = itertools.count(len(PUBLISHED_GENERATORS))
        return next(slot for number in numbers if (slot := f"gen_{number}") not in self.images)

    def members(self, number: int) -> list[tuple[str, bytes]]:
        """Names and contents, in the order of the names."""
        # The number makes the key unique; the words beside it, cut to what USTAR can hold of a name, are for people.
        words = _UNSAFE.sub("-", (self.group or "").rpartition("/")[2])[-60:].strip("-")
        key = f"{number:09d}-{words}" if words else f"{number:09d}"
        facts = {"format": 1, "group": self.group, "variant": self.variant, "images": self.facts}
        members = [(f"{key}.{slot}.{suffix}", data) for slot, (suffix, data) in self.images.items()]
        members.append((f"{key}.json", json.dumps(facts, sort_keys=True).encode()))
        # Sorted, so that the same record gives the same bytes each time.
        return sorted(members)


def _records(examples: Iterable[Example], limits: LimitSettings, skipped: list[Skipped]) -> Iterator[_Packing]:
    record: _Packing | None = None
    for example in examples:
        if (read := _read(example, limits, skipped)) is None:
            continue
        if record is None or not record.takes(example):
            if record is not None:
                yield record
            record = _Packing(example.group, example.variant)
        record.add(example, *read)
    if record is not None:
        yield record


def _read(example: Example, limits: LimitSettings, skipped: list[Skipped]) -> tuple[bytes, ImageFacts] | None:
    from code_worker.images.decode import inspect

    try:
        data = example.read()
        return data, inspect(data, limits)
    # Of no single image: going on would skip every one of them.
    except (StorageError, SourceCredentialsError):
        raise
    except (DatasetError, ImageRejectedError, TransientError) as error:
        skipped.append(Skipped(example.key, str(error)))
        return None


class _Shards:
    """Tar files of at most so many bytes, filled one after the other; the same members make the same bytes."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.names: list[str] = []
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def add(self, members: Sequence[tuple[str, bytes]]) -> None:
        """Appends one record, whole, to this shard or the next."""
        # A header and the content in whole blocks: never less than
        # it takes, so no shard grows beyond its limit by a record.
        blocks = sum(2 + len(data) // tarfile.BLOCKSIZE for _, data in members)
        if self._tar is not None and self._tar.offset + blocks * tarfile.BLOCKSIZE > self._shard_bytes:
            self._finish()
        tar = self._tar or self._begin()
        for name, data in members:
            info = tarfile.TarInfo(name)  # time 0, no owner: nothing of this machine
            info.size = len(data)
            info.mode = 0o644
            tar.addfile(info, io.BytesIO(data))

    def _begin(self) -> tarfile.TarFile:
        self.names.append(f"shard-{len(self.names):06d}.tar")
        self._file = (self._directory / self.names[-1]).open("xb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - _finish
        return self._tar

    def _finish(self) -> None:
        tar, file, self._tar, self._file = self._tar, self._file, None, None
        if file is not None:
            with file:
                if tar is not None:
                    tar.close()
                file.flush()
                # Before the directory gets its name: a loss of power leaves no shard of it half written.
                os.fsync(file.fileno())


@contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place when the block ends well, and is removed when it does not."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigurationError(f"{out} is not empty; name a directory that does not exist yet")
    try:
        with ExitStack() as stack:
            try:
                partial = stack.enter_context(whole_directory(out))
            except OSError as error:
                raise ConfigurationError(f"cannot write beside {out}: {error.strerror}") from error
            yield partial
    except OSError as error:
        raise DatasetError(f"cannot write {out}: {error.strerror or error}; nothing of it was left") from error
