"""Images of a directory or bucket: told by suffix, else by the first bytes; the rest is counted and named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Final

IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp"}
)
_TIFF: Final = (b"MM\0*", b"II*\0", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")
SIGNATURES: Final[Mapping[str, Callable[[bytes], bool]]] = {
    "jpeg": lambda prefix: prefix.startswith(b"\xff\xd8\xff"),
    "png": lambda prefix: prefix.startswith(b"\x89PNG\r\n\x1a\n"),
    "gif": lambda prefix: prefix.startswith((b"GIF87a", b"GIF89a")),
    "bmp": lambda prefix: prefix.startswith(b"BM"),
    "tiff": lambda prefix: prefix.startswith(_TIFF),
    "webp": lambda prefix: prefix[:4] == b"RIFF" and prefix[8:15] == b"WEBPVP8",
}
"""By format that is judged, what its files begin with."""
_BRANDS: Final = {
    **dict.fromkeys((b"avif", b"avis"), "avif"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "heif"),
    b"crx ": "cr3",
}
_PNM: Final = re.compile(rb"P[1-6]\s+(?:#|[0-9]+\s+[0-9]+\s)|P7\nWIDTH [0-9]")
_ICO_PLANES: Final[frozenset[bytes]] = frozenset(
    bytes((0, planes, 0, bits)) for planes in (0, 1) for bits in (0, 1, 4, 8, 16, 24, 32)
)
_UNJUDGED: Final[Mapping[str, Callable[[bytes], bool]]] = {
    "jpeg 2000": lambda prefix: prefix.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0")),
    "jpeg xl": lambda prefix: prefix.startswith(b"\0\0\0\x0cJXL \r\n\x87\n"),
    "ico": lambda prefix: prefix[:4] == b"\0\0\1\0" and prefix[4:6] != bytes(2) and prefix[9:13] in _ICO_PLANES,
    "pnm": lambda prefix: _PNM.match(prefix) is not None,
    "psd": lambda prefix: prefix.startswith((b"8BPS\0\1", b"8BPS\0\2")),
    "exr": lambda prefix: prefix.startswith(b"v/1\1\2"),
    "dds": lambda prefix: prefix.startswith(b"DDS \x7c\0\0\0"),
    "qoi": lambda prefix: prefix.startswith(b"qoif") and prefix[12:13] in {b"\3", b"\4"},
    "hdr": lambda prefix: prefix.startswith(b"#?RADIANCE"),
}
LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
"""What a file begins with that a clone without Git LFS has in place of a large one."""
PREFIX_BYTES: Final = 17
"""One more than the longest signature: a bare signature is no header, nothing that follows could contradict it."""
NO_IMAGE: Final = "neither the name nor the content is that of an image"
UNJUDGED: Final = "an image of a format that is not judged: {}"
OTHER_KIND: Final = "the name is that of another kind of file, and to look into it would take a request"
_NAMED: Final = 10


class LeftOut:
    """Counts of what a walk left out: files that are no images, by reason, and unreadable directories.

    Attributes:
        lost: places and why: links to directories, directories that cannot be listed.
        unreadable: how many of them cannot be listed.
    """

    def __init__(self) -> None:
        self.lost: list[tuple[str, str]] = []
        self.unreadable = 0
        self._passed_over: dict[str, tuple[int, list[str]]] = {}

    def pass_over(self, name: str, reason: str) -> None:
        """Counts a file, or a directory that is not looked into; the first 10 of a reason are named."""
        count, names = self._passed_over.get(reason, (0, []))
        if count < _NAMED:
            names.append(name)
        self._passed_over[reason] = count + 1, names

    def lose(self, place: str, reason: str, *, unreadable: bool) -> None:
        """Notes a place that may hold images."""
        self.lost.append((place, reason))
        self.unreadable += unreadable

    @property
    def passed_over(self) -> Iterator[tuple[str, int, tuple[str, ...]]]:
        """Reason, number of files, and the first of them by name."""
        for reason, (count, names) in self._passed_over.items():
            yield reason, count, tuple(names)


def signature_of(prefix: bytes) -> str | None:
    """Format that is judged of a file that begins like this, if any; see `PREFIX_BYTES`."""
    if len(prefix) < PREFIX_BYTES:
        return None
    return next((kind for kind, begins in SIGNATURES.items() if begins(prefix)), None)


def unjudged_format(prefix: bytes) -> str | None:
    """Format of an image that is known but not judged, by the first `PREFIX_BYTES` bytes of its file."""
    if prefix[4:8] == b"ftyp":
        return _BRANDS.get(prefix[8:12])
    return next((kind for kind, begins in _UNJUDGED.items() if begins(prefix)), None)


def why_no_image(prefix: bytes) -> str:
    """Returns why a file is passed over that does not look like an image that is judged."""
    return NO_IMAGE if (kind := unjudged_format(prefix)) is None else UNJUDGED.format(kind)


def looks_like_image(prefix: bytes) -> bool:
    """Returns whether a file whose name says nothing is an image, by its first `PREFIX_BYTES` bytes."""
    kind = signature_of(prefix)
    # Two letters make no BMP: behind them stand its size and four reserved bytes, which are 0.
    return kind is not None and (kind != "bmp" or prefix[6:10] == bytes(4))


def has_image_suffix(name: str) -> bool:
    """Returns whether a name ends as those of images that are judged do, in any case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_hidden(part: str) -> bool:
    """Returns whether a part of a path is of the system: `.DS_Store`, `._photo.jpg`, `__MACOSX`."""
    return part.startswith((".", "__MACOSX")) and part not in {".", ".."}
