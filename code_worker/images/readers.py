"""Pillow's readers, one per accepted format, kept from what a hostile header would have them do."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from code_worker.errors import ImageRejectedError
from code_worker.images.listing import LFS_POINTER, PREFIX_BYTES, UNJUDGED, signature_of, unjudged_format
from code_worker.images.pillow import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_TYPE_BYTES: Final = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
_INTEGERS: Final = {3: "H", 4: "L", 16: "Q"}
_MOST: Final = 65_536
_MOST_PARTS: Final = 65_536
"""Rows of four planes at the longest side, or the largest image in tiles of 32 by 32."""
_PARTS: Final = (273, 279, 324, 325)
"""StripOffsets, StripByteCounts, TileOffsets, TileByteCounts."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of a directory: what it is, how many values of which type, and where in the file they are."""

    tag: int
    kind: int
    values: int
    at: int

    @property
    def size(self) -> int:
        return self.values * _unit(self.kind)


class _Directory:
    """The first directory; it may lie beyond the end of the file."""

    def __init__(self, data: bytes) -> None:
        self.order = "<" if data[:2] == b"II" else ">"
        big = struct.unpack_from(f"{self.order}H", data, 2)[0] == 43
        forms = ("Q", "HHQ", "Q") if big else ("H", "HHL", "L")
        self._count, self._entry, self._word = (self.order + form for form in forms)
        self._data = data
        self.word_bytes = struct.calcsize(self._word)
        self._step = struct.calcsize(self._entry) + self.word_bytes
        self._at: int = struct.unpack_from(self._word, data, self.word_bytes)[0]
        self.begin: int = self._at + struct.calcsize(self._count)

    @property
    def end(self) -> int:
        """Returns where it ends, the link to the next one included."""
        return int(self.begin + self._entries * self._step + self.word_bytes)

    @property
    def _entries(self) -> int:
        (count,) = struct.unpack_from(self._count, self._data, self._at)
        return int(count)

    def __iter__(self) -> Iterator[_Entry]:
        last = min(self.begin + min(self._entries, _MOST) * self._step, len(self._data) - self._step + 1)
        for at in range(self.begin, last, self._step):
            tag, kind, values = struct.unpack_from(self._entry, self._data, at)
            here = at + self._step - self.word_bytes
            far = values * _unit(kind) > self.word_bytes
            yield _Entry(tag, kind, values, struct.unpack_from(self._word, self._data, here)[0] if far else here)


def _unit(kind: int) -> int:
    return _TYPE_BYTES[kind] if kind < len(_TYPE_BYTES) else 0


def check_tiff_parts(data: bytes) -> None:
    """Refuses lists of strips or tiles that are longer than any image within the limits needs.

    Pillow makes a Python number of each place in them, which takes ten times what it takes in the file.

    Raises:
        ImageRejectedError: such a list.
        struct.error: the file ends in its header.
    """
    directory = _Directory(data)
    if directory.begin > len(data):
        return
    for entry in directory:
        # Of one that the file does not hold Pillow makes nothing.
        if entry.tag in _PARTS and entry.values > _MOST_PARTS and entry.at + entry.size <= len(data):
            raise ImageRejectedError(RejectReason.CORRUPT, f"tiff: {entry.values} strips or tiles")


def tiff_tile_size(tags: Mapping[int, Any]) -> tuple[int, int]:
    """Width and height of one tile, `(0, 0)` for an image in strips: libtiff makes room for a whole tile at once."""
    width, height = tags.get(322), tags.get(323)
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)


def tiff_ends(data: bytes) -> Iterator[int]:
    """Yields where each part that the first directory names would end."""
    directory = _Directory(data)
    yield directory.begin
    if directory.begin > len(data):
        return
    yield directory.end
    parts: dict[int, tuple[int, ...]] = {}
    for entry in directory:
        end = entry.at + entry.size
        yield end
        if entry.tag in _PARTS and entry.kind in _INTEGERS and entry.values <= _MOST and end <= len(data):
            form = f"{directory.order}{entry.values}{_INTEGERS[entry.kind]}"
            parts[entry.tag] = struct.unpack_from(form, data, entry.at)
    for offsets, sizes in (_PARTS[:2], _PARTS[2:]):
        yield from map(sum, zip(parts.get(offsets, ()), parts.get(sizes, ()), strict=False))


_MOST_STEPS: Final = 65_000
"""A tenth of a second of Pillow's, in which every other thread waits; a PNG with 20,000 texts takes 60,000."""
_MOST_STEPS_OF_DECODING: Final = 150_000
"""Two for each run of a packed BMP, which Pillow unpacks in Python while every other thread waits."""
_SLACK_BYTES: Final = 1 << 20
_PHOTOSHOP: Final = b"Photoshop 3.0\0"
_PHOTOSHOP_ITEM: Final = b"8BIM"
_EXIF: Final = b"Exif\0\0"
_COPIED_PER_STEP: Final = 1 << 14
"""Bytes that are copied in the time of one step, about 1.5 µs."""
_PNG_FILTER_AT: Final = 27
_MPF_FRAMES: Final = 0xB001
_ULTRA_HDR: Final = b' hdrgm:Version="'
_SCAN: Final = b"\xff\xda"
_END: Final = b"\xff\xd9"


class UnsupportedImageError(ValueError):
    """A header that is there, and asks for what Pillow's reader of the format does not read."""


PILLOW_ERRORS: Final = (
    OSError,  # the documented one; also UnidentifiedImageError and the codecs' own status texts
    SyntaxError,  # a header that a reader does not accept
    EOFError,  # an animation without a frame
    ValueError,  # ours, too; text and profile bombs, negative offsets, UnicodeDecodeError in a text chunk
    LookupError,  # a read past the end (IndexError), a code without a meaning (KeyError)
    TypeError,  # a tag of another type than the reader counts on, or absent
    AttributeError,  # a method that such a tag lacks
    ArithmeticError,  # an offset beyond a C integer, a rational with denominator zero
    AssertionError,  # readers assert what a header made them believe
    RuntimeError,  # a call in an order that only a broken file brings about; RecursionError
    SystemError,  # C code without a message
    BufferError,  # the same, of a buffer
    MemoryError,  # a size no header within the limits can ask for: a damaged length inside the file
    struct.error,  # a field cut short
    zlib.error,  # a compressed chunk
    Image.DecompressionBombError,
    Warning,  # a process may have turned warnings into errors; Pillow warns about the file, nothing else
)
"""What reading a hostile file can raise inside Pillow. Missing on purpose: ImportError and NameError, which tell of a
broken installation, and anything that is no Exception."""


class ImageBytes(io.BytesIO):
    """A file that refuses readers that go through it in too many pieces, or takes more from its header than it holds.

    Pillow walks chunks, segments and directories in Python, a few reads for each: millions of empty ones would take
    it minutes. And of a directory it keeps every value, though all of them may claim the same bytes.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._steps = _MOST_STEPS
        # Of a TIFF Pillow reads the directory twice.
        self._left = 2 * len(data) + _SLACK_BYTES
        self._exif_bytes = 0
        self._in_header = True
        self._ran_out = False

    @property
    def ran_out(self) -> bool:
        """True if Pillow wanted bytes that would have to follow the last one."""
        return self._ran_out

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads like any file, within the bounds of the class."""
        found = super().read(size)
        self._steps -= 1
        if found.startswith(_PHOTOSHOP):
            # Each item of such a segment is a step of Pillow's as well.
            self._steps -= _photoshop_items(found, self._steps)
        elif found.startswith(_EXIF):
            # Pillow copies all that it has of them whenever one is added.
            self._exif_bytes += len(found)
            self._steps -= self._exif_bytes // _COPIED_PER_STEP
        self._left -= len(found)
        # A header is read in pieces of known length, pixels in blocks until there are enough.
        if size and size > 0 and len(found) < (size if self._in_header else 1):
            self._ran_out = True
        if self._steps < 0:
            raise ImageRejectedError(RejectReason.CORRUPT, "the file is cut into too many parts")
        if self._left < 0:
            raise ImageRejectedError(RejectReason.CORRUPT, "parts of the header claim the same bytes")
        return found

    def header_is_read(self) -> None:
        """Ends the bound on reading: from here on decoding is bounded by the pixels."""
        self._steps = _MOST_STEPS_OF_DECODING
        self._left = 1 << 62
        self._in_header = False


def _photoshop_items(segment: bytes, most: int) -> int:
    """Items that Pillow finds in an image resource block, `most` + 1 where there are more."""
    at, count = len(_PHOTOSHOP), 0
    while count <= most and segment.startswith(_PHOTOSHOP_ITEM, at):
        count += 1
        try:
            at += 7 + segment[at + 6]
            at += at & 1
            at += 4 + struct.unpack_from(">L", segment, at)[0]
            at += at & 1
        except (IndexError, struct.error):
            break
    return count


class _Reader(ImageFile.ImageFile):
    """The shared part of the readers; the type of a refusal says whether another reader might take the header."""

    def _open(self) -> None:
        try:
            super()._open()  # type: ignore[safe-super]  # Pillow's reader of the format comes next
        except PILLOW_ERRORS as error:
            if self._is_of_unknown_kind():
                raise UnsupportedImageError(str(error)) from error
            raise
        if not self.mode or min(self.size) < 1:
            raise UnsupportedImageError(f"{self.width}×{self.height} pixels of a kind that is not read")

    def _is_of_unknown_kind(self) -> bool:
        """Returns whether a refused header has told its size, and then a kind of pixels without a mode in Pillow."""
        return self.size != (0, 0) and not self.mode


class _Jpeg(_Reader, JpegImagePlugin.JpegImageFile):
    """Of EXIF only Pillow's resolution would be read, by way of a directory without bounds: nobody asks for it."""

    def _read_dpi_from_exif(self) -> None:
        pass


class _Png(_Reader, PngImagePlugin.PngImageFile):
    def _is_of_unknown_kind(self) -> bool:
        # The filter method, which ends the header; Pillow refuses all but 0 before it has a size.
        return isinstance(self.fp, ImageBytes) and self.fp.getvalue()[_PNG_FILTER_AT : _PNG_FILTER_AT + 1] > b"\0"


class _Gif(_Reader, GifImagePlugin.GifImageFile):
    def _is_of_unknown_kind(self) -> bool:
        return False  # all GIFs are of one kind


class _Bmp(_Reader, BmpImagePlugin.BmpImageFile):
    def _is_of_unknown_kind(self) -> bool:
        return True  # a header of another version, depth, compression, layout or palette: no other is refused


class _Tiff(_Reader, TiffImagePlugin.TiffImageFile):
    pass


class _WebP(_Reader, WebPImagePlugin.WebPImageFile):
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
    return _Tiff(file, name)


# Image.open() would turn every failed header into "cannot identify image file" and apply a process-wide pixel
# limit of its own; the readers themselves say what is wrong, and our limits are the only ones.
_READERS: Final[dict[str, Callable[[io.BytesIO, str], ImageFile.ImageFile]]] = {
    "jpeg": _jpeg,
    "png": _Png,
    "gif": _Gif,
    "bmp": _Bmp,
    "tiff": _tiff,
    "webp": _WebP,
}
FORMATS: Final = tuple(_READERS)
"""What is judged, told by content and never by name."""


def kind_of(data: bytes) -> str:
    """Format of a file by its signature.

    Raises:
        ImageRejectedError: none that is judged.
    """
    if (kind := signature_of(data[:PREFIX_BYTES])) is not None:
        return kind
    if data.startswith(LFS_POINTER):
        raise ImageRejectedError(
            RejectReason.UNSUPPORTED_FORMAT, "a Git LFS pointer: `git lfs pull` fetches the file"
        )
    if (other := unjudged_format(data[:PREFIX_BYTES])) is not None:
        raise ImageRejectedError(RejectReason.UNSUPPORTED_FORMAT, UNJUDGED.format(other))
    raise ImageRejectedError(RejectReason.UNSUPPORTED_FORMAT, f"none of {', '.join(FORMATS)}")


def open_image(kind: str, file: ImageBytes) -> ImageFile.ImageFile:
    """The image with its header read and nothing decoded.

    Raises:
        ImageRejectedError: a header that would cost too much to read.
        UnsupportedImageError: a header that asks for what is not read.
        Exception: another one of `PILLOW_ERRORS`, as Pillow raises them.
    """
    image = _READERS[kind](file, "")
    file.header_is_read()
    return image


def scans_of(image: ImageFile.ImageFile, data: bytes) -> int:
    """Returns how many times an opened JPEG goes through its pixels.

    1, unless it is progressive or in separate colours.
    """
    at = image.fp.tell() if image.fp is not None else 0
    colours = len(getattr(image, "layer", ()))
    # Pillow has just read the first scan's header. One with all colours is the only one, unless it is progressive.
    header = _SCAN + struct.pack(">HB", 6 + 2 * colours, colours)
    if colours in {1, 3} and "progressive" not in image.info and data.startswith(header, at - 8 - 2 * colours):
        return 1
    end = data.find(_END, at)
    return 1 + data.count(_SCAN, at, end if end >= 0 else len(data))
