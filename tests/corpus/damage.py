"""Good files made bad: cut short, flipped, with wrong sums and impossible headers."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any

from tests.corpus.pictures import gradient
from tests.image_files import encoded, pixels, png, tiff

SHARES = (0.1, 0.5, 0.9, 0.999)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {}),
    "jpeg_progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "webp_lossless": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff_lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff_jpeg": ("TIFF", {"compression": "jpeg"}),
    "tiff_big": ("TIFF", {"big_tiff": True}),
}


def damaged() -> dict[str, bytes]:
    """Name → file that was good once."""
    return dict(_cut_short()) | dict(_flipped()) | dict(_sums()) | dict(_without_pixels()) | dict(_headers())


def flipped(data: bytes, bits: int, source: random.Random) -> bytes:
    """So many bits turned, anywhere behind the first bytes by which a format is told."""
    changed = bytearray(data)
    for _ in range(bits):
        changed[source.randrange(16, len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def _cut_short() -> Iterator[tuple[str, bytes]]:
    for name, (kind, options) in KINDS.items():
        data = encoded(pixels(300, 260), kind, **options)
        for share in SHARES:
            yield f"cut_{name}_{100 * share:g}", data[: int(len(data) * share)]


def _flipped() -> Iterator[tuple[str, bytes]]:
    jpeg, drawn = encoded(pixels(300, 260), "JPEG"), encoded(pixels(300, 260), "PNG")
    for seed in range(20):
        yield f"flips_jpeg_{seed}", flipped(jpeg, 30, random.Random(seed))
        yield f"flips_png_{seed}", flipped(drawn, 5, random.Random(seed))


def _sums() -> Iterator[tuple[str, bytes]]:
    drawn = encoded(gradient(), "PNG")
    at = drawn.index(b"IDAT") + 200
    yield "png_crc_of_pixels", drawn[:at] + bytes([drawn[at] ^ 1]) + drawn[at + 1 :]
    yield "png_crc_of_header", drawn[:29] + bytes([drawn[29] ^ 1]) + drawn[30:]


def _without_pixels() -> Iterator[tuple[str, bytes]]:
    jpeg, bmp, webp, gif = (encoded(gradient(), kind) for kind in ("JPEG", "BMP", "WEBP", "GIF"))
    yield "zero_png", png(0, 0)
    yield "zero_png_width", png(0, 10)
    yield "zero_jpeg", resized(jpeg, frame_at(jpeg), ">HH", 0, 0)
    yield "zero_bmp", resized(bmp, 18, "<ii", 0, 0)
    yield "zero_webp", resized(webp, 26, "<HH", 0, 0)
    yield "zero_gif", resized(gif, 6, "<HH", 0, 0)
    grey = {258: (3, [8]), 262: (3, [1]), 273: (4, [8]), 279: (4, [1])}
    yield "zero_tiff", tiff({256: (3, [0]), 257: (3, [0])} | grey, b"x")


def _headers() -> Iterator[tuple[str, bytes]]:
    jpeg, bmp = encoded(gradient(), "JPEG"), encoded(gradient(), "BMP")
    at = frame_at(jpeg)
    yield "jpeg_12_bit", jpeg[: at - 1] + b"\x0c" + jpeg[at:]
    yield "jpeg_without_tables", jpeg[: jpeg.index(b"\xff\xdb")] + jpeg[jpeg.index(b"\xff\xc0") :]
    yield "bmp_negative_width", resized(bmp, 18, "<ii", -224, 224)
    yield "bmp_17_bits", bmp[:28] + struct.pack("<H", 17) + bmp[30:]
    # A length of 2^31-1 in front of little: room must be made for what is there, not for what is said.
    drawn = encoded(gradient(), "PNG")
    yield "png_chunk_of_2_gib", drawn[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT" + drawn[41:]


def resized(data: bytes, at: int, form: str, width: int, height: int) -> bytes:
    """The file with another size in its header."""
    return data[:at] + struct.pack(form, width, height) + data[at + struct.calcsize(form) :]


def frame_at(data: bytes) -> int:
    """Where a baseline JPEG's header has its height and width."""
    return data.index(b"\xff\xc0") + 5
