"""Diagnosis of files that Pillow refuses: cut short, damaged, of a kind that is not read, or a bomb."""

from __future__ import annotations

from typing import Final

from code_worker.images.pillow import Image
from code_worker.images.readers import UnsupportedImageError, tiff_ends
from code_worker.types import RejectReason

_PNG_END: Final = b"IEND\xaeB`\x82"
_JPEG_END: Final = b"\xff\xd9"
_DECIDED_BY_STRUCTURE: Final = frozenset({"png", "tiff", "webp"})


def reason_for(error: BaseException, kind: str, data: bytes, *, ran_out: bool) -> RejectReason:
    """Reason that fits best why Pillow refused a file: by the error's type and the file's structure, never by words.

    PNG, TIFF and WebP tell by their own structure whether bytes are missing at the end: a damaged length makes
    Pillow run past the end of a file that is whole. Of the others those are cut short whose end Pillow went beyond.

    Args:
        error: What Pillow raised, one of `PILLOW_ERRORS`.
        kind: Format by signature, such as `png`.
        data: The file.
        ran_out: Whether Pillow wanted more than it holds.
    """
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return RejectReason.TOO_MANY_PIXELS
    if is_cut_short(kind, data) or (ran_out and kind not in _DECIDED_BY_STRUCTURE):
        return RejectReason.TRUNCATED
    if isinstance(error, UnsupportedImageError):
        return RejectReason.UNSUPPORTED_FORMAT
    return RejectReason.CORRUPT


def is_cut_short(kind: str, data: bytes) -> bool:
    """Returns whether the structure of a file that could not be read says that its end is missing."""
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
