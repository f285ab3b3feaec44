"""Image files made on the spot: every format, mode and odd size that decoding must agree with the reference on."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with smooth parts, edges and noise."""
    return Image.fromarray(_values(width, height, seed))


@lru_cache(64)
def _values(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """`(height, width, 3) uint8`, not to be changed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([128 + 100 * np.sin(x / 17 + k) * np.cos(y / (11 + k)) for k in range(3)], axis=-1)
    return np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The least of compression for a PNG, unless asked for: noise takes long and gets no smaller."""
    buffer = io.BytesIO()
    if kind == "PNG" and "optimize" not in options:
        options.setdefault("compress_level", 1)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _frames(width: int, height: int, count: int = 4) -> list[Image.Image]:
    return [pixels(width, height, seed) for seed in range(count)]


def animation(kind: str, width: int = 300, height: int = 260, **options: Any) -> bytes:
    first, *others = _frames(width, height)
    return encoded(first, kind, save_all=True, append_images=others, duration=20, **options)


def exif_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, body: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG with a header of one's choice and pixel data that need not match it."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(tags: dict[int, tuple[int, list[int]]], body: bytes = b"") -> bytes:
    """A little-endian TIFF: tag → (type 3 or 4, values that fit into four bytes); the body starts at byte 8."""
    entries = b""
    for tag, (kind, values) in sorted(tags.items()):
        form = f"<{len(values)}{'H' if kind == 3 else 'L'}"
        entries += struct.pack("<HHL", tag, kind, len(values)) + struct.pack(form, *values).ljust(4, b"\0")
    return b"II*\0" + struct.pack("<L", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def _paletted_with_alphas() -> bytes:
    image = pixels(280, 300).quantize(64, method=Image.Quantize.FASTOCTREE)
    return encoded(image, "PNG", transparency=bytes(range(0, 256, 4)))


def _sixteen_bit(kind: str, dtype: str) -> bytes:
    values = np.linspace(0, 65535, 301 * 260).reshape(260, 301).astype(dtype)
    return encoded(Image.fromarray(values), kind)


def _converted(mode: str, kind: str, **options: Any) -> bytes:
    image = pixels(301, 277)
    if mode == "RGBA" or mode == "LA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encoded(image.convert(mode), kind, **options)


SIZES = [
    (224, 224), (225, 225), (227, 231), (223, 900), (900, 223), (1000, 37), (37, 1000), (100, 80), (1, 1), (1, 500),
    (500, 2), (224, 225), (226, 229), (641, 427),
]  # fmt: skip
"""Around the crop's own size, under it on either side, and remainders that banker's rounding decides."""


def _sized(width: int, height: int, kind: str) -> bytes:
    return encoded(pixels(width, height), kind)


def _followed_by(picture: Image.Image, more: bytes) -> bytes:
    return encoded(picture, "JPEG") + more


def valid_files() -> dict[str, Callable[[], bytes]]:
    """Name → a function that makes a file which the reference decodes; the names alone cost nothing."""
    picture = pixels(333, 301)
    files = {f"png_{width}x{height}": partial(_sized, width, height, "PNG") for width, height in SIZES}
    files |= {f"jpeg_{width}x{height}": partial(_sized, width, height, "JPEG") for width, height in SIZES}
    files |= {f"jpeg_subsampling_{n}": partial(encoded, picture, "JPEG", subsampling=n) for n in range(3)}
    files |= {
        f"tiff_{c}": partial(encoded, picture, "TIFF", compression=c) for c in ("raw", "tiff_lzw", "jpeg", "packbits")
    }
    files |= {f"png_{mode}": partial(_converted, mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    files |= {
        f"tiff_{mode}": partial(_converted, mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "F")
    }
    files |= {f"tiff_{mode}": partial(_converted, mode, "TIFF") for mode in ("YCbCr", "LAB")}
    files |= {f"bmp_{mode}": partial(_converted, mode, "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")}
    files |= {f"webp_{mode}": partial(_converted, mode, "WEBP", lossless=True) for mode in ("RGB", "RGBA")}
    files |= {f"gif_{mode}": partial(_converted, mode, "GIF") for mode in ("1", "L", "P", "RGBA")}
    files |= {
        "jpeg_progressive": partial(encoded, picture, "JPEG", progressive=True),
        "jpeg_grey": partial(_converted, "L", "JPEG"),
        "jpeg_cmyk": partial(_converted, "CMYK", "JPEG"),
        "jpeg_icc_garbage": partial(encoded, picture, "JPEG", icc_profile=b"not a profile"),
        "jpeg_trailing_bytes": partial(_followed_by, picture, bytes(1000)),
        "jpeg_mpo": partial(encoded, picture, "MPO", save_all=True, append_images=[pixels(333, 301, 9)]),
        "webp_lossy": partial(encoded, picture, "WEBP", quality=70),
        "png_16bit": partial(_sixteen_bit, "PNG", "uint16"),
        "tiff_16bit": partial(_sixteen_bit, "TIFF", "uint16"),
        "tiff_16bit_big_endian": partial(_sixteen_bit, "TIFF", ">u2"),
        "png_palette_with_alphas": _paletted_with_alphas,
        "png_palette_one_transparent": partial(
            encoded, picture.quantize(32, method=Image.Quantize.FASTOCTREE), "PNG", transparency=3
        ),
        "png_palette_small": partial(
            encoded,
            pixels(90, 70).quantize(16, method=Image.Quantize.FASTOCTREE),
            "PNG",
            transparency=bytes([9, 200]),
        ),
        "png_rgb_transparent_colour": partial(encoded, picture, "PNG", transparency=(1, 2, 3)),
        "png_grey_transparent_level": partial(encoded, picture.convert("L"), "PNG", transparency=7),
        "png_optimised": partial(encoded, picture, "PNG", optimize=True),
        "gif_transparent": partial(
            encoded, picture.quantize(16, method=Image.Quantize.FASTOCTREE), "GIF", transparency=2
        ),
        "gif_animated": partial(animation, "GIF"),
        "webp_animated": partial(animation, "WEBP"),
        "apng": partial(animation, "PNG"),
        "tiff_two_pages": partial(encoded, picture, "TIFF", save_all=True, append_images=[pixels(20, 20)]),
        "polyglot_jpeg_zip": partial(_followed_by, picture, b"PK\x03\x04" + bytes(50)),
    }
    for value in (1, 3, 6, 8, 99):
        files[f"jpeg_orientation_{value}"] = partial(encoded, picture, "JPEG", exif=exif_orientation(value))
        files[f"webp_orientation_{value}"] = partial(encoded, picture, "WEBP", exif=exif_orientation(value))
        files[f"tiff_orientation_{value}"] = partial(encoded, picture, "TIFF", tiffinfo={274: value})
    return files
