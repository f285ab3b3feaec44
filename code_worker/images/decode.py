"""From the bytes of a file to the 224×224 pixels that are judged."""

from __future__ import annotations

import hashlib
import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from code_worker.errors import ImageRejectedError
from code_worker.images.damage import PILLOW_ERRORS, reason_for, tiff_tile_size, webp_size
from code_worker.images.region import jpeg_region, leave_out_rows_below
from code_worker.types import IMAGE_SIZE, ImageFacts, RejectReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from code_worker.settings import LimitSettings

__all__ = ["FORMATS", "centre", "decode", "decode_whole", "inspect"]

FORMATS: Final = ("jpeg", "png", "gif", "bmp", "tiff", "webp")
"""What is judged, told by content and never by name."""

_PREFIX_BYTES: Final = 16
_JPEG: Final = ("jpeg", "mpo")
# Image.open() would turn every failed header into "cannot identify image file" and apply a process-wide pixel
# limit of its own; the readers themselves say what is wrong, and the limits below are the only ones.
_READERS: Final[dict[str, tuple[Callable[[bytes], bool | str], Callable[[io.BytesIO, str], ImageFile.ImageFile]]]] = {
    "jpeg": (lambda prefix: prefix.startswith(b"\xff\xd8\xff"), JpegImagePlugin.jpeg_factory),
    "png": (lambda prefix: prefix.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    "gif": (lambda prefix: prefix.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    "bmp": (lambda prefix: prefix.startswith(b"BM"), BmpImagePlugin.BmpImageFile),
    "tiff": (lambda prefix: prefix.startswith(tuple(TiffImagePlugin.PREFIXES)), TiffImagePlugin.TiffImageFile),
    "webp": (lambda prefix: prefix[:4] == b"RIFF" and prefix[8:15] == b"WEBPVP8", WebPImagePlugin.WebPImageFile),
}


def decode(data: bytes, limits: LimitSettings, *, sha256: str | None = None) -> tuple[NDArray[np.uint8], ImageFacts]:
    """Reads the central 224×224 pixels of an image at its native resolution.

    The result is the one of `PIL.Image.open(…).convert("RGB")` and torchvision's `CenterCrop(224)`, byte for byte;
    what lies outside the crop is not decoded where that changes no pixel (see `region`), and the crop is taken before
    the colours are converted. A side under 224 is padded with zeros. EXIF orientation and alpha are ignored, an
    animation is its first frame.

    Args:
        data: The file.
        limits: What it may cost; sides and pixels are read from the header before anything is decoded.
        sha256: Its content hash in hexadecimal, from whoever has computed it; unset: it is computed.

    Returns:
        `(224, 224, 3) uint8` pixels, and what the file is: content hash, size, format, original sides and mode.

    Raises:
        ImageRejectedError: for whatever these bytes are instead of an image within the limits.
    """
    with _opened(data, limits, sha256) as (image, facts):
        if facts.format in _JPEG and (pixels := _jpeg_centre(data, image)) is not None:
            return pixels, facts
        leave_out_rows_below(data, image, _span(image.height)[1])
        return centre(image), facts


def _jpeg_centre(data: bytes, image: ImageFile.ImageFile) -> NDArray[np.uint8] | None:
    (left, right, pad_left), (top, bottom, pad_top) = _span(image.width), _span(image.height)
    inner = jpeg_region(data, image, (left, top, right, bottom))
    return None if inner is None else _padded(inner, pad_left, pad_top)


def inspect(data: bytes, limits: LimitSettings, *, sha256: str | None = None) -> ImageFacts:
    """What `decode` says of a file beside its pixels, from the header alone, under the same limits.

    Raises:
        ImageRejectedError: as `decode`, as far as the header tells.
    """
    with _opened(data, limits, sha256) as (_, facts):
        return facts


def decode_whole(data: bytes, limits: LimitSettings) -> Image.Image:
    """The whole image at its native resolution as RGB, for those who transform it before they crop it.

    Its centre is what `decode` gives.

    Raises:
        ImageRejectedError: as `decode`.
    """
    with _opened(data, limits) as (image, _):
        image.load()
        return _as_rgb(image.copy())


@contextmanager
def _opened(
    data: bytes, limits: LimitSettings, sha256: str | None = None
) -> Iterator[tuple[ImageFile.ImageFile, ImageFacts]]:
    """An image within the limits, header read and nothing decoded; errors inside the block are translated too."""
    if not data:
        raise ImageRejectedError(RejectReason.EMPTY, "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise ImageRejectedError(
            RejectReason.TOO_LARGE_BYTES, f"{len(data)} bytes are more than the limit of {limits.max_bytes}"
        )
    kind = _kind(data)
    # Pillow makes room for a WebP's whole canvas on opening it.
    if kind == "webp" and (size := webp_size(data)) is not None:
        _check_size(size, limits)
    try:
        with _READERS[kind][1](io.BytesIO(data), "") as image:
            facts = _facts(data, image, sha256)
            _check_size(image.size, limits)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                _check_area(*tiff_tile_size(image.tag_v2), limits)
            yield image, facts
    except PILLOW_ERRORS as error:
        raise ImageRejectedError(reason_for(error, kind, data), _detail(kind, error)) from error


def _kind(data: bytes) -> str:
    prefix = data[:_PREFIX_BYTES]
    # A bare signature is no header: nothing that follows could contradict it.
    if len(data) > _PREFIX_BYTES:
        for kind, (accepts, _) in _READERS.items():
            if accepts(prefix):
                return kind
    raise ImageRejectedError(RejectReason.UNSUPPORTED_FORMAT, f"none of {', '.join(FORMATS)}")


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
    # convert("RGB") drops alpha whatever this says; it would only complain about palettes with several alphas.
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
