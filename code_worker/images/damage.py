"""What a file that Pillow refuses suffers from: cut short, damaged, of a kind that is not read, or a bomb."""

from __future__ import annotations

import struct
import zlib
from typing import Final

from PIL import Image

from code_worker.images.tiff import tiff_ends
from code_worker.types import RejectReason

__all__ = ["PILLOW_ERRORS", "is_cut_short", "reason_for", "webp_size"]

PILLOW_ERRORS: Final = (
    OSError,  # the documented one; also UnidentifiedImageError and the codecs' own status texts
    SyntaxError,  # a header that a reader does not accept
    EOFError,  # an animation without a frame
    ValueError,  # text and profile bombs, negative offsets, UnicodeDecodeError in a text chunk
    LookupError,  # a read past the end (IndexError), a code without a meaning (KeyError)
    TypeError,  # a tag of another type than the reader counts on, or absent
    AttributeError,  # as above
    ArithmeticError,  # an offset beyond a C integer, a rational with denominator zero
    AssertionError,  # readers assert what a header made them believe
    RuntimeError,  # a call in an order that only a broken file brings about; RecursionError
    SystemError,  # C code without a message
    BufferError,  # as above
    MemoryError,  # a size no header within the limits can ask for: a damaged length inside the file
    struct.error,  # a field cut short
    zlib.error,  # a compressed chunk
    Image.DecompressionBombError,
    Warning,  # a process may have turned warnings into errors; Pillow warns about the file, nothing else
)
"""What reading a hostile file can raise inside Pillow. Missing on purpose: ImportError and NameError, which tell of a
broken installation, and whatever is no Exception."""

_UNSUPPORTED: Final = ("unsupported", "unknown", "cannot handle", "invalid dimensions", "not identified by")
_RAN_OUT: Final = (IndexError, EOFError, struct.error)
_PNG_END: Final = b"IEND\xaeB`\x82"
_JPEG_END: Final = b"\xff\xd9"
_DECIDED_BY_STRUCTURE: Final = frozenset({"png", "tiff", "webp"})


def reason_for(error: BaseException, kind: str, data: bytes) -> RejectReason:
    """Reason that fits best why Pillow refused a file.

    PNG, TIFF and WebP tell by their own structure whether bytes are missing at the end: a damaged length makes
    Pillow run past the end of a file that is whole. For the others the reader's words decide.

    Args:
        error: What Pillow raised, one of `PILLOW_ERRORS`.
        kind: Format by signature, such as `png`.
        data: The file.
    """
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return RejectReason.TOO_MANY_PIXELS
    text = str(error).lower()
    if kind == "png" and "not identified by this driver" in text:
        return RejectReason.UNSUPPORTED_FORMAT
    if is_cut_short(kind, data) or (kind not in _DECIDED_BY_STRUCTURE and _says_cut_short(error, text)):
        return RejectReason.TRUNCATED
    if any(words in text for words in _UNSUPPORTED):
        return RejectReason.UNSUPPORTED_FORMAT
    return RejectReason.CORRUPT


def _says_cut_short(error: BaseException, text: str) -> bool:
    return "truncated" in text or isinstance(error.__cause__ or error, _RAN_OUT)


def is_cut_short(kind: str, data: bytes) -> bool:
    """Whether the structure of a file that could not be read says that its end is missing."""
    if kind == "png":
        return _PNG_END not in data
    if kind == "jpeg":
        return _JPEG_END not in data
    if kind == "webp":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "tiff":
        return any(end > len(data) for end in tiff_ends(data))
    return False


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas of a WebP, width and height in pixels (RFC 9649 §2.5–2.7); None if its header is cut short."""
    if len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None
