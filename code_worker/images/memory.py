"""The memory that decoding takes, told from the header; large images of a process wait for each other."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Final

from code_worker.errors import ImageRejectedError
from code_worker.images.pillow import TiffImagePlugin
from code_worker.images.readers import scans_of
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import ImageFile

_MODE_BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2}
"""Per pixel, as Pillow stores them; every other mode takes four."""
_WEBP_BYTES: Final = 12
"""libwebp composes frames on two canvases, and hands out a copy of one."""
_COEFFICIENT_BYTES: Final = 2
_LARGE_BYTES: Final = 16 << 20
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLES, _BITS, _ORIENTATION = 278, 322, 323, 277, 258, 274


def jpeg_buffer_bytes(image: ImageFile.ImageFile, data: bytes) -> int:
    """Bytes that libjpeg needs beside the pixels: all coefficients, where there is more than one scan."""
    if "progressive" not in image.info and scans_of(image, data) == 1:
        return 0
    parts = [(max(1, part[1]), max(1, part[2])) for part in getattr(image, "layer", ())] or [(1, 1)]
    across, down = (max(part[axis] for part in parts) for axis in (0, 1))
    samples = sum(width * height for width, height in parts) / (across * down)
    return int(_COEFFICIENT_BYTES * samples * image.width * image.height)


def pillow_bytes(image: ImageFile.ImageFile, data: bytes) -> int:
    """Bytes that decoding the whole of an opened image takes at most, its file not counted."""
    pixels = image.width * image.height
    stored = _MODE_BYTES.get(image.mode, 4) * pixels
    match image.format:
        case "JPEG" | "MPO":
            return stored + jpeg_buffer_bytes(image, data)
        case "WEBP":
            return _WEBP_BYTES * pixels
        case "GIF":
            return 2 * stored
        case "BMP" if image.tile and image.tile[0].codec_name == "bmp_rle":
            return stored + 2 * pixels
        case "TIFF":
            return stored + _tiff_bytes(image, stored)
    return stored


def _tiff_bytes(image: ImageFile.ImageFile, stored: int) -> int:
    """Returns what libtiff needs for a strip or a tile, and Pillow to turn the image by its orientation."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    turned = stored if image.tag_v2.get(_ORIENTATION, 1) != 1 else 0
    if not image.tile or image.tile[0].codec_name != "libtiff":
        return turned
    tags = image.tag_v2
    rows, width = tags.get(_TILE_HEIGHT) or tags.get(_ROWS_PER_STRIP), tags.get(_TILE_WIDTH)
    rows = rows if isinstance(rows, int) else image.height
    width = width if isinstance(width, int) else image.width
    bits, samples = tags.get(_BITS, (1,)), tags.get(_SAMPLES, 1)
    depth = max(bits) if isinstance(bits, tuple) and bits else 8
    per_pixel = max(4, depth // 8 * (samples if isinstance(samples, int) else 4))
    return turned + min(rows, max(image.height, tags.get(_TILE_HEIGHT) or 0)) * width * per_pixel


@cache
def _trim() -> Callable[[int], int] | None:
    """Gives freed memory back to the system, with glibc; other C libraries give back what is large by themselves."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class _MemoryBudget:
    """Bytes that all threads of a process share, in the order in which they asked: nothing large starves."""

    def __init__(self) -> None:
        self.empty()

    def empty(self) -> None:
        """Forgets all reservations: a forked child does not have the threads that made them."""
        self._changed = threading.Condition()
        self._taken = 0
        self._asking: deque[object] = deque()

    def take(self, size: int, limit: int) -> None:
        """Waits until `size` bytes are left of `limit`."""
        ticket = object()
        with self._changed:
            self._asking.append(ticket)
            try:
                self._changed.wait_for(lambda: self._asking[0] is ticket and self._taken + size <= limit)
                self._taken += size
            finally:
                self._asking.remove(ticket)
                self._changed.notify_all()

    def give_back(self, size: int) -> None:
        """Ends a `take`."""
        with self._changed:
            self._taken -= size
            self._changed.notify_all()


# Memory is the process's, shared by all that decodes in it, with any settings.
_budget = _MemoryBudget()
os.register_at_fork(after_in_child=_budget.empty)


@contextmanager
def reserved_memory(size: int, limit: int) -> Iterator[None]:
    """Holds so many bytes of the process's share while its block decodes and frees; never two inside each other.

    Raises:
        ImageRejectedError: more than the whole share; nobody was waited for.
    """
    if size == 0:
        yield
        return
    if size > limit:
        raise ImageRejectedError(
            RejectReason.TOO_MANY_PIXELS, f"decoding would take {size} bytes; the limit is {limit}"
        )
    _budget.take(size, limit)
    try:
        yield
    finally:
        # Else it would be kept for this thread: eight that decode in turn would hold eight times the memory of one.
        if size >= _LARGE_BYTES and (trim := _trim()) is not None:
            trim(0)
        _budget.give_back(size)
