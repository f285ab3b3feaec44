"""Files that are odd and yet images: all formats and modes, metadata of all sorts, several frames, polyglots."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

from tests.image_files import encoded, exif_orientation, pixels, png, png_chunk

SIDE = 224


def gradient(width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A smooth picture without noise: small in every format."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), (x + y) % 256)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def good_files() -> dict[str, bytes]:
    """One plain file of each accepted format."""
    kinds = ("jpeg", "png", "webp", "gif", "bmp", "tiff")
    return {f"ok_{kind}": encoded(gradient(), kind.upper()) for kind in kinds}


def pictures() -> dict[str, bytes]:
    """Name → file that is to be judged."""
    return good_files() | dict(_modes()) | dict(_metadata()) | dict(_frames()) | dict(_polyglots()) | dict(_small())


def _modes() -> Iterator[tuple[str, bytes]]:
    picture = pixels(240, 230)
    faded = picture.copy()
    faded.putalpha(Image.linear_gradient("L").resize(picture.size))
    for mode in ("1", "L", "P"):
        yield f"mode_png_{mode}", encoded(picture.convert(mode), "PNG")
    for mode in ("LA", "RGBA"):
        yield f"mode_png_{mode}", encoded(faded.convert(mode), "PNG")
    deep = Image.fromarray(np.linspace(0, 65535, 240 * 230).reshape(230, 240).astype(np.uint16))
    yield "mode_png_I16", encoded(deep, "PNG")
    yield "mode_tiff_I16", encoded(deep, "TIFF")
    yield "mode_jpeg_CMYK", encoded(picture.convert("CMYK"), "JPEG")
    yield "mode_tiff_CMYK", encoded(picture.convert("CMYK"), "TIFF")
    yield "mode_jpeg_L", encoded(picture.convert("L"), "JPEG")
    yield "mode_webp_RGBA", encoded(faded, "WEBP", lossless=True)
    yield (
        "mode_gif_transparent",
        encoded(picture.quantize(16, method=Image.Quantize.FASTOCTREE), "GIF", transparency=2),
    )


def _small() -> Iterator[tuple[str, bytes]]:
    for kind in ("png", "jpeg", "gif"):
        yield f"one_pixel_{kind}", encoded(gradient(1, 1), kind.upper())


def _metadata() -> Iterator[tuple[str, bytes]]:
    picture = gradient()
    plain = encoded(picture, "JPEG")
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # when it was made
    yield "icc_srgb", encoded(picture, "JPEG", icc_profile=bytes(profile))
    yield "icc_garbage_jpeg", encoded(picture, "JPEG", icc_profile=b"no profile at all")
    yield "icc_garbage_png", encoded(picture, "PNG", icc_profile=b"no profile at all")
    yield "exif_garbage", encoded(picture, "JPEG", exif=b"Exif\0\0\xff\xfe no directory")
    yield "exif_cut", encoded(picture, "JPEG", exif=exif_orientation(6)[:15])
    yield "exif_40_segments", plain[:2] + _segment(0xE1, b"Exif\0\0MM\0*" + bytes(65_000)) * 40 + plain[2:]
    yield "exif_orientation_6", encoded(gradient(300, 100), "JPEG", exif=exif_orientation(6))
    yield "exif_orientation_99", encoded(gradient(300, 100), "JPEG", exif=exif_orientation(99))
    yield "tiff_mostly_metadata", encoded(picture, "TIFF", icc_profile=bytes(3_000_000))
    yield "jpeg_unknown_segments", plain[:2] + _segment(0xEF, b"?") * 500 + plain[2:]
    dot = zlib.compress(bytes(110))
    texts = b"".join(png_chunk(b"iTXt", b"k%d\0\0\0\0\0v" % n) for n in range(20_000))
    yield "png_20000_texts", png(10, 10, body=dot, extra=texts)
    yield "png_crc_of_end", _flipped_last(encoded(picture, "PNG"))


def _segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes((marker,)) + struct.pack(">H", len(body) + 2) + body


def _flipped_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _frames() -> Iterator[tuple[str, bytes]]:
    def several(kind: str, count: int, **options: object) -> bytes:
        plain = gradient(64, 64).convert("L" if kind == "GIF" else "RGB")  # colours would be chosen for each frame
        first, *others = [plain.rotate(7 * number) for number in range(count)]
        return encoded(first, kind, save_all=True, append_images=others, **options)

    yield "gif_200_frames", several("GIF", 200, duration=20)
    yield "apng_50_frames", several("PNG", 50, duration=20)
    yield "webp_50_frames", several("WEBP", 50, duration=20)
    yield "mpo_2_frames", several("MPO", 2)
    yield "tiff_500_pages", several("TIFF", 500)
    looped = bytearray(encoded(gradient(), "TIFF"))
    # The link to the next directory comes last of the first one; it is made to lead back to it.
    directory = struct.unpack_from("<L", looped, 4)[0]
    count = struct.unpack_from("<H", looped, directory)[0]
    struct.pack_into("<L", looped, directory + 2 + 12 * count, directory)
    yield "tiff_directory_loop", bytes(looped)


def _polyglots() -> Iterator[tuple[str, bytes]]:
    jpeg, drawn = encoded(gradient(), "JPEG"), encoded(gradient(), "PNG")
    # As a script, a file that begins with `GIF89a/*` is one name and a comment; as an image it is 10,799 wide.
    script = encoded(gradient(0x2A2F, 8).quantize(16, method=Image.Quantize.FASTOCTREE), "GIF")
    yield "polyglot_gif_js", b"GIF89a" + script[6:] + b"*/=1;alert(1);"
    yield "polyglot_jpeg_zip", jpeg + b"PK\x03\x04" + bytes(200)
    yield "polyglot_png_php", drawn[:33] + png_chunk(b"tEXt", b"c\0<?php system($_GET['c']);?>") + drawn[33:]
    yield "polyglot_jpeg_html", jpeg[:2] + _segment(0xFE, b"<script>alert(1)</script>") + jpeg[2:]
    yield "trailing_megabyte", jpeg + bytes(1_000_000)
    yield "png_named_jpg", drawn
