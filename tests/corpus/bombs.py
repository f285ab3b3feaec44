"""Small files that would take much memory or time: by their header, when inflated, by the number of their parts."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from tests.corpus.damage import frame_at, resized
from tests.corpus.pictures import gradient
from tests.image_files import animation, encoded, png, png_chunk, tiff

MOST = 7071
"""Side of the largest square that the default limit of pixels lets through."""


def bombs() -> dict[str, bytes]:
    """Name → bomb."""
    return dict(_inflating()) | dict(_headers()) | dict(_within_limits()) | dict(_parts()) | dict(_directories())


def zeros(count: int) -> bytes:
    """So many zero bytes, deflated, made without holding them."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    rest = packer.compress(bytes(count & 0xFFFFF)) + packer.flush()
    checksum = count % 65_521 << 16 | 1  # Adler-32 of zeros
    return b"\x78\xda" + (count >> 20) * block + rest + struct.pack(">I", checksum)


def _inflating() -> Iterator[tuple[str, bytes]]:
    yield "bomb_png_10k_1bit", png(10_000, 10_000, bits=1, body=zeros(10_000 * (10_000 // 8 + 1)))
    yield "bomb_png_9k_rgb", png(9_000, 9_000, colour=2, body=zeros(9_000 * (9_000 * 3 + 1)))
    dot, text = zlib.compress(bytes(110)), zeros(80_000_000)
    yield "bomb_zTXt", png(10, 10, body=dot, extra=png_chunk(b"zTXt", b"bomb\0\0" + text))
    yield "bomb_iCCP", png(10, 10, body=dot, extra=png_chunk(b"iCCP", b"bomb\0\0" + text))
    yield "bomb_iTXt", png(10, 10, body=dot, extra=png_chunk(b"iTXt", b"bomb\0\1\0\0\0" + text))
    yield "bomb_png_pixels_without_end", png(224, 224, body=zeros(100_000_000))


def _headers() -> Iterator[tuple[str, bytes]]:
    jpeg, bmp, gif, webp = (encoded(gradient(), kind) for kind in ("JPEG", "BMP", "GIF", "WEBP"))
    lossless = encoded(gradient(), "WEBP", lossless=True)
    for side in (13_400, 20_000, 60_000, 2**31 - 1):
        yield f"header_png_{side}", png(side, side)
    yield "header_png_tall", png(1, 20_000)
    yield "header_png_wide", png(20_000, 1)
    yield "header_jpeg_65535", resized(jpeg, frame_at(jpeg), ">HH", 65_535, 65_535)
    yield "header_bmp_65535", resized(bmp, 18, "<ii", 65_535, 65_535)
    yield "header_gif_65535", resized(gif, 6, "<HH", 65_535, 65_535)
    frame = gif.index(b",") + 5
    yield "header_gif_frame", resized(gif, frame, "<HH", 65_535, 65_535)
    yield "header_webp_16383", resized(webp, 26, "<HH", 16_383, 16_383)
    yield "header_webp_lossless", lossless[:21] + struct.pack("<I", 16_382 | 16_382 << 14) + lossless[25:]
    animated = animation("WEBP", 64, 64)
    at = animated.index(b"VP8X") + 8
    canvas = bytes(4) + 2 * (16_000).to_bytes(3, "little")
    yield "header_webp_canvas", animated[:at] + canvas + animated[at + 10 :]
    grey = {258: (3, [8]), 262: (3, [1]), 277: (3, [1])}
    strip = {273: (4, [8]), 279: (4, [1])}
    yield "header_tiff_90k", tiff({256: (4, [90_000]), 257: (4, [90_000])} | grey | strip, b"x")
    tile = {259: (3, [8]), 322: (4, [16_000]), 323: (4, [16_000]), 324: (4, [8]), 325: (4, [20])}
    yield "header_tiff_tile", tiff({256: (3, [64]), 257: (3, [64])} | grey | tile, bytes(20))


def _within_limits() -> Iterator[tuple[str, bytes]]:
    """As large as may be, of nothing but zeros: to be judged, but not all at once."""
    whole = png(MOST, MOST, colour=6, body=zeros(MOST * (MOST * 4 + 1)))
    yield "vast_png_rgba", whole
    yield "vast_png_broken", whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]
    yield "vast_gif", encoded(Image.new("P", (MOST, MOST)), "GIF")
    yield "vast_jpeg", encoded(Image.new("RGB", (MOST, MOST)), "JPEG")
    yield "vast_jpeg_progressive", encoded(Image.new("L", (MOST, MOST)), "JPEG", progressive=True)
    yield "vast_webp", encoded(Image.new("RGB", (MOST, MOST)), "WEBP", quality=1, method=0)


def _parts() -> Iterator[tuple[str, bytes]]:
    dot = zlib.compress(bytes(110))
    jpeg = encoded(gradient(), "JPEG")
    yield "parts_png_chunks", png(10, 10, body=dot, extra=png_chunk(b"prVt", b"") * 1_000_000)
    yield "parts_png_texts", png(10, 10, body=dot, extra=png_chunk(b"tEXt", b"a\0b") * 500_000)
    yield "parts_png_empty_pixels", png(10, 10, body=dot, extra=png_chunk(b"IDAT", b"") * 1_000_000)
    yield "parts_jpeg_segments", jpeg[:2] + b"\xff\xef\0\2" * 2_000_000 + jpeg[2:]
    yield "parts_jpeg_fill_bytes", jpeg[:2] + b"\xff" * 5_000_000 + jpeg[2:]
    yield "parts_jpeg_junk", jpeg[:20] + bytes(5_000_000) + jpeg[20:]
    exif = b"\xff\xe1" + struct.pack(">H", 65_008) + b"Exif\0\0" + bytes(65_000)
    yield "parts_jpeg_exif", jpeg[:2] + exif * 200 + jpeg[2:]
    yield "parts_jpeg_scans", _scans(300, 4_000)
    yield "parts_bmp_runs", _runs(2_000_000)
    yield "parts_tiff_tiles", _tiles(200_000)


def _scans(count: int, side: int) -> bytes:
    """A progressive JPEG that refines the same bits over and over: each scan goes through the whole image."""
    data = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + count * last + b"\xff\xd9"


def _tiles(count: int) -> bytes:
    """A TIFF in tiles of one pixel, all at the same place."""
    side = {256: (3, [500]), 257: (3, [count // 500]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    lists = {324: (4, [8]), 325: (4, [8 + 4 * count])}
    places, sizes = (struct.pack("<L", number) * count for number in (8, 1))
    data = bytearray(tiff(side | {322: (3, [1]), 323: (3, [1])} | lists, places + sizes))
    for tag in lists:
        at = data.rindex(struct.pack("<HHL", tag, 4, 1))
        struct.pack_into("<L", data, at + 4, count)
    return bytes(data)


def _runs(count: int) -> bytes:
    """A BMP whose rows are packed as runs of one pixel."""
    start = 14 + 40 + 1024
    body = b"\1\1" * count + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, MOST, MOST, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + bytes(1024) + body


def _directories() -> Iterator[tuple[str, bytes]]:
    """Directories whose every entry claims the whole file for its value."""
    jpeg = encoded(gradient(), "JPEG")
    yield "directory_tiff", _directory(3_000, 1_000_000)
    yield "directory_exif", _with_segments(jpeg, 0xE1, b"Exif\0\0", _directory(2_700, 65_000))
    yield "directory_exif_joined", _with_segments(jpeg, 0xE1, b"Exif\0\0", _directory(5_000, 1_000_000))
    yield "directory_mpf", _with_segments(jpeg, 0xE2, b"MPF\0", _directory(2_700, 65_000))


def _directory(entries: int, size: int) -> bytes:
    head = b"II*\0" + struct.pack("<LH", 8, entries)
    body = b"".join(struct.pack("<HHLL", 1_000 + number, 7, size - 8, 8) for number in range(entries))
    return (head + body).ljust(size, b"\0")


def _with_segments(jpeg: bytes, marker: int, name: bytes, body: bytes) -> bytes:
    """With the body in segments of the header, in place of the JFIF one."""
    pieces = [name + body[at : at + 65_000] for at in range(0, len(body), 65_000)]
    segments = b"".join(b"\xff" + bytes((marker,)) + struct.pack(">H", len(one) + 2) + one for one in pieces)
    return jpeg[:2] + segments + jpeg[4 + struct.unpack(">H", jpeg[4:6])[0] :]
