"""Pillow's readers, one per accepted format, kept from what a hostile header would have them do."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Final

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from code_worker.errors import ImageRejectedError
from code_worker.images.tiff import check_tiff_parts
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FORMATS", "kind_of", "open_image", "scans_of"]

_PREFIX_BYTES: Final = 16
_MOST_STEPS: Final = 65_000
"""A tenth of a second of Pillow's, in which every other thread waits; a PNG with 20,000 texts takes 60,000."""
_MOST_STEPS_OF_DECODING: Final = 150_000
"""Two for each run of a packed BMP, which Pillow unpacks in Python while every other thread waits."""
_SLACK_BYTES: Final = 1 << 20
_PHOTOSHOP: Final = b"Photoshop 3.0\0"
_PHOTOSHOP_ITEM_BYTES: Final = 12
_EXIF: Final = b"Exif\0\0"
_EXIF_STEPS: Final = 5
_MPF_FRAMES: Final = 0xB001
_ULTRA_HDR: Final = b' hdrgm:Version="'
_SCAN: Final = b"\xff\xda"
_END: Final = b"\xff\xd9"


class _Steps(io.BytesIO):
    """A file that refuses whoever goes through it in too many pieces, or takes more from its header than it holds.

    Pillow walks chunks, segments and directories in Python, a few reads for each: millions of empty ones would take
    it minutes. And of a directory it keeps every value, though all of them may claim the same bytes.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._steps = _MOST_STEPS
        # Of a TIFF Pillow reads the directory twice.
        self._left = 2 * len(data) + _SLACK_BYTES
        self._exif_segments = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self._steps -= 1
        if found.startswith(_PHOTOSHOP):
            # Each item of such a segment is a step of Pillow's as well.
            self._steps -= len(found) // _PHOTOSHOP_ITEM_BYTES
        elif found.startswith(_EXIF):
            # Pillow copies all that it has of them whenever one is added.
            self._exif_segments += 1
            self._steps -= _EXIF_STEPS * self._exif_segments
        self._left -= len(found)
        if self._steps < 0:
            raise ImageRejectedError(RejectReason.CORRUPT, "the file is cut into too many parts")
        if self._left < 0:
            raise ImageRejectedError(RejectReason.CORRUPT, "parts of the header claim the same bytes")
        return found

    def header_is_read(self) -> None:
        """What follows may be read as often as decoding wants it: that is bounded by the pixels."""
        self._steps = _MOST_STEPS_OF_DECODING
        self._left = 1 << 62


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """Of EXIF only Pillow's resolution would be read, by way of a directory without bounds: nobody asks for it."""

    def _read_dpi_from_exif(self) -> None:
        pass


def _jpeg(file: io.BytesIO, name: str) -> ImageFile.ImageFile:
    image = _Jpeg(file, name)
    ultra_hdr = any(segment == "APP1" and _ULTRA_HDR in content for segment, content in image.applist)
    if not ultra_hdr and _frames_of(image.info.get("mp", b"")) > 1:
        # A stereo or burst image keeps Pillow's name for it.
        image.format = "MPO"
    return image


def _frames_of(index: bytes) -> int:
    """Number of images that a multi-picture index (CIPA DC-007 §5.2.3) names; 0 where it names none."""
    order = ">" if index.startswith(b"MM") else "<"
    try:
        at = struct.unpack_from(f"{order}L", index, 4)[0]
        for entry in range(at + 2, at + 2 + 12 * min(16, struct.unpack_from(f"{order}H", index, at)[0]), 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHLL", index, entry)
            if tag == _MPF_FRAMES:
                return int(value)
    except struct.error:
        return 0
    return 0


def _tiff(file: io.BytesIO, name: str) -> ImageFile.ImageFile:
    check_tiff_parts(file.getvalue())
    return TiffImagePlugin.TiffImageFile(file, name)


# Image.open() would turn every failed header into "cannot identify image file" and apply a process-wide pixel
# limit of its own; the readers themselves say what is wrong, and our limits are the only ones.
_READERS: Final[dict[str, tuple[Callable[[bytes], bool | str], Callable[[io.BytesIO, str], ImageFile.ImageFile]]]] = {
    "jpeg": (lambda prefix: prefix.startswith(b"\xff\xd8\xff"), _jpeg),
    "png": (lambda prefix: prefix.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    "gif": (lambda prefix: prefix.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    "bmp": (lambda prefix: prefix.startswith(b"BM"), BmpImagePlugin.BmpImageFile),
    "tiff": (lambda prefix: prefix.startswith(tuple(TiffImagePlugin.PREFIXES)), _tiff),
    "webp": (lambda prefix: prefix[:4] == b"RIFF" and prefix[8:15] == b"WEBPVP8", WebPImagePlugin.WebPImageFile),
}
FORMATS: Final = tuple(_READERS)
"""What is judged, told by content and never by name."""


def kind_of(data: bytes) -> str:
    """Format of a file by its signature.

    Raises:
        ImageRejectedError: none that is judged.
    """
    prefix = data[:_PREFIX_BYTES]
    # A bare signature is no header: nothing that follows could contradict it.
    if len(data) > _PREFIX_BYTES:
        for kind, (accepts, _) in _READERS.items():
            if accepts(prefix):
                return kind
    raise ImageRejectedError(RejectReason.UNSUPPORTED_FORMAT, f"none of {', '.join(FORMATS)}")


def open_image(kind: str, data: bytes) -> ImageFile.ImageFile:
    """The image with its header read and nothing decoded.

    Raises:
        ImageRejectedError: a header that would cost too much to read.
        Exception: one of `damage.PILLOW_ERRORS`, as Pillow raises them.
    """
    file = _Steps(data)
    image = _READERS[kind][1](file, "")
    file.header_is_read()
    return image


def scans_of(image: ImageFile.ImageFile, data: bytes) -> int:
    """How many times an opened JPEG goes through its pixels: 1, unless it is progressive or in separate colours."""
    at = image.fp.tell() if image.fp is not None else 0
    colours = len(getattr(image, "layer", ()))
    # Pillow has just read the first scan's header. One with all colours is the only one, unless it is progressive.
    header = _SCAN + struct.pack(">HB", 6 + 2 * colours, colours)
    if colours in {1, 3} and "progressive" not in image.info and data.startswith(header, at - 8 - 2 * colours):
        return 1
    end = data.find(_END, at)
    return 1 + data.count(_SCAN, at, end if end >= 0 else len(data))
