"""The centre of an image without the rest of it, where that changes no pixel; Pillow decodes all others whole.

Three ways, each exact: an optional extension decodes one rectangle of a JPEG; of a WebP the rectangle is cut from
libwebp's own canvas; of an uncompressed TIFF the rows below the crop are left out. Each takes a file or declines it,
and refuses none: what Pillow makes of a file that is not whole is left to Pillow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from PIL import ImageFile

    Box: TypeAlias = tuple[int, int, int, int]
    Decoder = Callable[[bytes, int, int, int, int], bytes | None]


_EXTENSION: Final = "code_worker_jpeg"
_ORIENTATION: Final = 0x0112
_JPEG_MODES: Final = frozenset({"L", "RGB"})


def _load() -> tuple[Decoder | None, str]:
    try:
        module = import_module(_EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != _EXTENSION:
            return None, str(error)
        return None, "not installed"
    except ImportError as error:
        return None, str(error)
    return module.decode_region, f"{_EXTENSION} {module.__version__}"


_decoder, _described = _load()


def region_decoder() -> tuple[bool, str]:
    """Returns whether the JPEG extension is at work, and its version or why not."""
    return _decoder is not None, _described


def jpeg_region(data: bytes, image: ImageFile.ImageFile, box: Box) -> NDArray[np.uint8] | None:
    """The `(height, width, 3) uint8` pixels inside a box; None where only Pillow's decode is known to be right.

    Args:
        data: a JPEG.
        image: it, opened by Pillow and not loaded.
        box: left, top, right and bottom inside of it, as Pillow counts them.
    """
    if _decoder is None or image.mode not in _JPEG_MODES:
        return None
    left, top, right, bottom = box
    found = _decoder(data, left, top, right - left, bottom - top)
    return None if found is None else np.frombuffer(found, np.uint8).reshape(bottom - top, right - left, 3)


def webp_region(data: bytes, image: ImageFile.ImageFile, box: Box) -> NDArray[np.uint8] | None:  # noqa: ARG001 - a region's
    """The `(height, width, 3) uint8` pixels inside a box of the first frame, without a copy of the whole of it.

    Alpha is dropped as `convert("RGB")` drops it. None where Pillow has another way to read a WebP.

    Raises:
        EOFError: there is no frame to decode; Pillow's words for it.
    """
    decoder, bands = getattr(image, "_decoder", None), len(getattr(image, "rawmode", ""))
    if decoder is None or bands not in {3, 4}:
        return None
    if (found := decoder.get_next()) is None:
        raise EOFError("failed to decode next frame in WebP file")
    left, top, right, bottom = box
    canvas = np.frombuffer(found[0], np.uint8).reshape(image.height, image.width, bands)
    return np.ascontiguousarray(canvas[top:bottom, left:right, :3])


def leave_out_rows_below(image: ImageFile.ImageFile, size: int, bottom: int) -> None:
    """Has Pillow stop at row `bottom` of an uncompressed TIFF, if it may: the rows below stay black.

    Only where every strip lies inside the file of `size` bytes: plain rows hold nothing else that Pillow could
    refuse. A PNG is read to its end. Its rows are one stream, and only inflating all of it tells whether Pillow
    refuses it; checksums of the chunks say nothing about an encoder's error.
    """
    # Others are not asked whether they are animated: a GIF would be read on to its second frame.
    if bottom >= image.height or image.format != "TIFF" or getattr(image, "is_animated", False):
        return
    if _is_whole_raw(image, size):
        image.tile = [_shortened(tile, bottom) for tile in image.tile if _extents(tile)[1] < bottom]


def _shortened(tile: Any, bottom: int) -> Any:
    left, top, right, end = _extents(tile)
    return tile._replace(extents=(left, top, right, min(end, bottom)))


def _extents(tile: Any) -> Box:
    return cast("Box", tile.extents)


def _is_whole_raw(image: ImageFile.ImageFile, size: int) -> bool:
    """Returns whether all tiles are plain rows from the top down in the file, and nothing turns the image later."""
    for tile in image.tile:
        name, _, offset, args = tile
        left, top, right, bottom = _extents(tile)
        if name != "raw" or not isinstance(args, tuple) or len(args) != 3 or args[2] != 1:
            return False
        stride = args[1] or _row_bytes(right - left, len(image.getbands()), args[0])
        if offset + (bottom - top) * stride > size:
            return False
    return bool(image.getexif().get(_ORIENTATION, 1) == 1)


def _row_bytes(width: int, bands: int, raw_mode: str) -> int:
    if raw_mode.startswith("1"):
        return (width + 7) // 8
    return width * bands * (2 if "16" in raw_mode else 1)
