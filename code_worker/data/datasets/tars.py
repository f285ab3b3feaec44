"""Members of a tar file, listed without extracting one and read where they lie; damage is told, not guessed over."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, Final, cast

from code_worker.data.datasets.examples import Skipped, disguise, not_images
from code_worker.errors import DatasetError
from code_worker.images.listing import PREFIX_BYTES, LeftOut
from code_worker.system.terminal import printable

Refuse = Callable[[str, Callable[[], bytes]], str | None]

_GZIP: Final = b"\x1f\x8b"
_HEADER_BYTES: Final = 1 << 16
"""Largest extended header; tarfile would read what a header claims, and gzip turns a megabyte into a gigabyte."""
_TAR_ERRORS: Final = (
    tarfile.TarError,
    ValueError,  # a number in a header that is none
    OverflowError,  # one beyond a C integer
    EOFError,  # gzip's end cut off
    zlib.error,
    LookupError,  # a sparse map cut short
    RecursionError,  # extended headers for extended headers
)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar; one of a compressed tar is held in memory, since nothing can be found in it again."""

    tar: Path
    name: str
    offset: int
    size: int
    held: bytes | None = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """`shard.tar:member`, printable."""
        return f"{printable(str(self.tar))}:{printable(self.name)}"

    def read(self) -> bytes:
        """The bytes.

        Raises:
            DatasetError: the tar is gone, unreadable or shorter than when it was listed.
        """
        if self.held is not None:
            return self.held
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DatasetError(f"{self.key}: cannot be read: {error.strerror}") from error
        if len(data) != self.size:
            raise DatasetError(f"{self.key}: the tar is shorter than when it was listed")
        return data


class _Capped:
    """A file of which no read takes more than a header may; remembers the last block, which ended the list."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.last = b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        self.last = self._file.read(size)
        return self.last

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def list_members(path: Path, refuse: Refuse, *, max_bytes: int, skipped: list[Skipped]) -> Iterator[Member]:
    """Members of a tar in their order, only those that are not refused, and of these only whole plain files.

    A tar cut short gives what is whole; the rest is one entry of `skipped`. Names are words here, never places.

    Args:
        path: The tar, plain or gzip.
        refuse: Why a member is passed over, or None; told its name as it stands in the tar, and what gives its first
            `PREFIX_BYTES` bytes.
        max_bytes: Larger members are skipped.
        skipped: Takes what could not be used, and at the end how many members were passed over.
    """
    left_out = LeftOut()
    try:
        with _opened(path) as (file, whole_bytes):
            yield from _Listing(path, refuse, max_bytes, skipped, left_out).members(file, whole_bytes)
    except OSError as error:
        skipped.append(Skipped(printable(str(path)), f"cannot be read: {error.strerror or error}"))
    skipped.extend(not_images(str(path), left_out))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file, decompressed, and its length where that can be known."""
    if not path.is_file():  # a FIFO would wait for its writer
        raise FileNotFoundError(None, "there is no such file")
    with path.open("rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
        packed = head.startswith(_GZIP)
        if not packed and (instead := disguise(head)) is not None:
            raise OSError(instead)
        file.seek(0)
        if packed:
            with gzip.open(file) as unpacked:
                yield cast("BinaryIO", unpacked), None
        else:
            yield file, path.stat().st_size


class _Content:
    """Content of the member at which the file stands; a compressed one is read once, and forwards only."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._first: bytes | None = None

    def first(self) -> bytes:
        """Its first `PREFIX_BYTES` bytes."""
        if self._first is None:
            self._first = self._file.read(min(self._size, PREFIX_BYTES))
        return self._first

    def whole(self) -> bytes:
        """All of it."""
        first = self._first or b""
        data = first + self._file.read(self._size - len(first))
        if len(data) != self._size:
            raise tarfile.ReadError("unexpected end of data")
        return data


@dataclass(frozen=True, slots=True)
class _Listing:
    """One pass over one tar; `whole_bytes` is unknown of a compressed one, whose members are held."""

    path: Path
    refuse: Refuse
    max_bytes: int
    skipped: list[Skipped]
    left_out: LeftOut

    def members(self, file: BinaryIO, whole_bytes: int | None) -> Iterator[Member]:
        capped = _Capped(file)
        last = ""
        try:
            # `r:` takes no compression of tarfile's own choice; what
            # is compressed was opened here, with a cap on its reads.
            with tarfile.open(fileobj=cast("IO[bytes]", capped), mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # or it would keep every header of the shard
                    last = info.name
                    _check_size(info, whole_bytes)
                    content = _Content(file, info.size)
                    if self._is_usable(info, content):
                        data = None if whole_bytes is not None else content.whole()
                        yield Member(self.path, info.name, info.offset_data, info.size, data)
            reason = _end(capped.last)
        except _TAR_ERRORS as error:
            reason = f"cut short or damaged: {error}"
        if reason is not None:
            after = f" (after {printable(last)})" if last else ""
            self.skipped.append(Skipped(printable(str(self.path)), f"{reason}{after}"))

    def _is_usable(self, info: tarfile.TarInfo, content: _Content) -> bool:
        if info.isdir():
            return False
        if (why := self.refuse(info.name, content.first)) is not None:
            self.left_out.pass_over(info.name, why)
            return False
        if (reason := _refusal(info, self.max_bytes)) is not None:
            self.skipped.append(Skipped(f"{printable(str(self.path))}:{printable(info.name)}", reason))
        return reason is None


def _check_size(info: tarfile.TarInfo, whole_bytes: int | None) -> None:
    if info.size < 0:  # it would lead back to where the list has been
        raise tarfile.ReadError("a header claims a negative size")
    if whole_bytes is not None and info.offset_data + info.size > whole_bytes:
        raise tarfile.ReadError("unexpected end of data")


def _refusal(info: tarfile.TarInfo, max_bytes: int) -> str | None:
    if not info.isreg() or info.issparse():
        return "not a plain file"
    if not info.size:
        return "an empty file"
    return f"over {max_bytes} bytes" if info.size > max_bytes else None


def _end(block: bytes) -> str | None:
    """Returns what is wrong with the block that ended the list; tarfile takes any that is no header for the end."""
    if not block:
        return "ends without an end mark: it may be cut short"
    if len(block) < tarfile.BLOCKSIZE:
        return "cut short in a header"
    return None if not any(block) else "a damaged header"
