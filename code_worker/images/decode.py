"""From the bytes of a file to the 224×224 pixels that are judged."""

from __future__ import annotations

import hashlib
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from code_worker.errors import ImageRejectedError, TransientError
from code_worker.images.damage import reason_for, webp_size
from code_worker.images.memory import jpeg_buffer_bytes, pillow_bytes, reserved_memory
from code_worker.images.pillow import TiffImagePlugin
from code_worker.images.readers import PILLOW_ERRORS, ImageBytes, kind_of, open_image, scans_of, tiff_tile_size
from code_worker.images.region import jpeg_region, leave_out_rows_below, webp_region
from code_worker.types import IMAGE_SIZE, ImageFacts, RejectReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from PIL import ImageFile

    from code_worker.images.region import Box
    from code_worker.settings import LimitSettings

_JPEG: Final = ("JPEG", "MPO")
_MOST_SCANNED: Final = 1_000_000_000
"""Pixels times scans: a second of libjpeg's, and twenty scans of the largest image, where ten are usual."""
_PIXEL_BYTES: Final = 4


def decode(data: bytes, limits: LimitSettings, *, sha256: str | None = None) -> tuple[NDArray[np.uint8], ImageFacts]:
    """Reads the central 224×224 pixels of an image at its native resolution.

    The result is the one of `PIL.Image.open(…).convert("RGB")` and torchvision's `CenterCrop(224)`, byte for byte;
    what these refuse is refused. What lies outside the crop is not decoded where that changes neither (see `region`),
    and the crop is taken before the colours are converted. A side under 224 is padded with zeros. EXIF orientation
    and alpha are ignored, an animation is its first frame. No switch of Pillow's that the process has set counts.

    Args:
        data: The file.
        limits: What it may cost; sides and pixels are read from the header before anything is decoded.
        sha256: Its content hash in hexadecimal, if the caller has computed it; unset: it is computed.

    Returns:
        `(224, 224, 3) uint8` pixels, and what the file is: content hash, size, format, original sides and mode.

    Raises:
        ImageRejectedError: if these bytes are no image within the limits.
        TransientError: this machine has no memory left for an image that is within the limits.
    """
    with _opened(data, limits) as image:
        facts = _facts(data, image, sha256)
        return _centre_of(data, image, limits), facts


def decode_crop(data: bytes, limits: LimitSettings) -> NDArray[np.uint8]:
    """The pixels that `decode` gives, for those who know or need nothing else of the file.

    Raises:
        ImageRejectedError, TransientError: as `decode`.
    """
    with _opened(data, limits) as image:
        return _centre_of(data, image, limits)


def _centre_of(data: bytes, image: ImageFile.ImageFile, limits: LimitSettings) -> NDArray[np.uint8]:
    if image.format in _JPEG:
        with reserved_memory(jpeg_buffer_bytes(image, data), limits.max_decode_bytes):
            if (pixels := _inside(jpeg_region, data, image)) is not None:
                return pixels
    with reserved_memory(pillow_bytes(image, data), limits.max_decode_bytes), _pixels_freed(image):
        if image.format == "WEBP" and (pixels := _inside(webp_region, data, image)) is not None:
            return pixels
        leave_out_rows_below(image, len(data), _span(image.height)[1])
        return centre(image)


@contextmanager
def _pixels_freed(image: ImageFile.ImageFile) -> Iterator[None]:
    """Frees what was decoded at the end of its share of memory; the frames of an error would keep it for longer."""
    try:
        yield
    except PILLOW_ERRORS as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        image.close()
        vars(image).pop("_decoder", None)  # a WebP's, with its canvases


def _inside(
    region: Callable[[bytes, ImageFile.ImageFile, Box], NDArray[np.uint8] | None],
    data: bytes,
    image: ImageFile.ImageFile,
) -> NDArray[np.uint8] | None:
    """The crop by way of a reader of regions, if it takes this file."""
    (left, right, pad_left), (top, bottom, pad_top) = _span(image.width), _span(image.height)
    inner = region(data, image, (left, top, right, bottom))
    return None if inner is None else _padded(inner, pad_left, pad_top)


def inspect(data: bytes, limits: LimitSettings, *, sha256: str | None = None) -> ImageFacts:
    """Returns what `decode` says of a file beside its pixels, from the header alone, under the same limits.

    Raises:
        ImageRejectedError: as `decode`, as far as the header tells.
    """
    with _opened(data, limits) as image:
        return _facts(data, image, sha256)


def decode_whole(
    data: bytes, limits: LimitSettings, *, least_side: int | None = None, alpha: bool = False
) -> Image.Image:
    """The whole image at its native resolution as RGB, for those who transform it before they crop it.

    Its centre is what `decode` gives.

    Args:
        data: The file.
        limits: What it may cost.
        least_side: A JPEG may be decoded at a half, a quarter or an eighth of its size, as long as both sides keep
            so many pixels: for those who shrink it anyway.
        alpha: An image that has transparency is given as RGBA, its colours the same.

    Raises:
        ImageRejectedError, TransientError: as `decode`.
    """
    with _opened(data, limits) as image:
        if least_side is not None and image.format in _JPEG:
            image.draft(None, (least_side, least_side))
        # Whole images were chosen by the caller: one that takes more than all the memory has it for itself.
        needed = pillow_bytes(image, data) + 2 * _PIXEL_BYTES * image.width * image.height
        with reserved_memory(min(needed, limits.max_decode_bytes), limits.max_decode_bytes), _pixels_freed(image):
            image.load()
            pixels = np.asarray(image.convert("RGBA") if alpha and image.has_transparency_data else _as_rgb(image))
    return Image.fromarray(pixels)


@contextmanager
def _opened(data: bytes, limits: LimitSettings) -> Iterator[ImageFile.ImageFile]:
    """An image within the limits, header read and nothing decoded; errors inside the block are translated too."""
    if not data:
        raise ImageRejectedError(RejectReason.EMPTY, "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise ImageRejectedError(
            RejectReason.TOO_LARGE_BYTES, f"{len(data)} bytes are more than the limit of {limits.max_bytes}"
        )
    kind = kind_of(data)
    # Pillow makes room for a WebP's whole canvas on opening it.
    if kind == "webp" and (size := webp_size(data)) is not None:
        _check_size(size, limits)
    file = ImageBytes(data)
    try:
        with open_image(kind, file) as image:
            _check_size(image.size, limits)
            if kind == "jpeg":
                _check_scans(image, data)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                _check_area(*tiff_tile_size(image.tag_v2), limits)
            yield image
    except PILLOW_ERRORS as error:
        if isinstance(error, MemoryError) and _is_short(limits.max_decode_bytes):
            raise TransientError(RejectReason.INTERNAL, "no memory left to decode an image in") from error
        raise ImageRejectedError(reason_for(error, kind, data, ran_out=file.ran_out), _detail(kind, error)) from error


def _is_short(size: int) -> bool:
    """Returns whether it is memory that is missing.

    Where it is not, a damaged length has asked for too much of it.
    """
    try:
        bytearray(size)
    except MemoryError:
        return True
    return False


def _check_scans(image: ImageFile.ImageFile, data: bytes) -> None:
    scans = scans_of(image, data)
    if scans * image.width * image.height > _MOST_SCANNED:
        raise ImageRejectedError(
            RejectReason.CORRUPT, f"jpeg: {scans} scans of {image.width}×{image.height} pixels each"
        )


def _check_size(size: tuple[int, int], limits: LimitSettings) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageRejectedError(RejectReason.UNSUPPORTED_FORMAT, f"the header says {width}×{height} pixels")
    if max(size) > limits.max_side:
        raise ImageRejectedError(
            RejectReason.TOO_MANY_PIXELS, f"a side of {max(size)} pixels is over the limit of {limits.max_side}"
        )
    _check_area(width, height, limits)
    if min(size) < limits.min_side:
        raise ImageRejectedError(
            RejectReason.TOO_SMALL, f"a side of {min(size)} pixels is under the limit of {limits.min_side}"
        )


def _check_area(width: int, height: int, limits: LimitSettings) -> None:
    if width * height > limits.max_pixels:
        raise ImageRejectedError(
            RejectReason.TOO_MANY_PIXELS, f"{width}×{height} pixels are over the limit of {limits.max_pixels}"
        )


def _facts(data: bytes, image: ImageFile.ImageFile, sha256: str | None) -> ImageFacts:
    """Header facts; a stereo or burst JPEG keeps Pillow's name for it, `mpo`."""
    return ImageFacts(
        sha256=sha256 or hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        format=(image.format or "").lower(),
        width=image.width,
        height=image.height,
        mode=image.mode,
    )


def centre(image: Image.Image) -> NDArray[np.uint8]:
    """The central `(224, 224, 3) uint8` pixels of an image, as `decode` cuts them."""
    image.load()
    # Sides are read again: Pillow turns a TIFF by its orientation while loading it.
    left, right, pad_left = _span(image.width)
    top, bottom, pad_top = _span(image.height)
    return _padded(np.asarray(_as_rgb(image.crop((left, top, right, bottom)))), pad_left, pad_top)


def _padded(inner: NDArray[np.uint8], left: int, top: int) -> NDArray[np.uint8]:
    pixels = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    pixels[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return pixels


def _as_rgb(image: Image.Image) -> Image.Image:
    # convert("RGB") drops alpha in any case; it would only complain about palettes with several alphas.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _span(side: int) -> tuple[int, int, int]:
    """First and last pixel of the crop along one side, and the padding before it, as torchvision rounds them."""
    if side < IMAGE_SIZE:
        return 0, side, (IMAGE_SIZE - side) // 2
    start = round((side - IMAGE_SIZE) / 2.0)
    return start, start + IMAGE_SIZE, 0


def _detail(kind: str, error: BaseException) -> str:
    return f"{kind}: {str(error) or type(error).__name__}"[:200]
