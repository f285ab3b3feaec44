"""Whatever a file holds, decoding ends with pixels or with a named reason."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from code_worker.errors import ImageRejectedError
from code_worker.images.damage import PILLOW_ERRORS, reason_for
from code_worker.images.decode import decode
from code_worker.settings import LimitSettings
from code_worker.types import RejectReason
from tests.image_files import animation, encoded, pixels, png, png_chunk, tiff

LIMITS = LimitSettings()
PICTURE = pixels(300, 260)
WHOLE = {
    "jpeg": encoded(PICTURE, "JPEG"),
    "jpeg_progressive": encoded(PICTURE, "JPEG", progressive=True),
    "png": encoded(PICTURE, "PNG"),
    "gif": encoded(PICTURE, "GIF"),
    "bmp": encoded(PICTURE, "BMP"),
    "webp": encoded(PICTURE, "WEBP"),
    "webp_lossless": encoded(PICTURE, "WEBP", lossless=True),
    "tiff": encoded(PICTURE, "TIFF"),
    "tiff_lzw": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff_jpeg": encoded(PICTURE, "TIFF", compression="jpeg"),
    "tiff_big": encoded(PICTURE, "TIFF", big_tiff=True),
}


def reason(data: bytes, limits: LimitSettings = LIMITS) -> RejectReason:
    with pytest.raises(ImageRejectedError) as caught:
        decode(data, limits)
    return caught.value.reason


def test_no_bytes_are_empty() -> None:
    assert reason(b"") is RejectReason.EMPTY


def test_a_file_over_the_byte_limit_is_refused_unread() -> None:
    data = WHOLE["png"]
    assert decode(data, LimitSettings(max_bytes=len(data)))[1].size_bytes == len(data)
    assert reason(data, LimitSettings(max_bytes=len(data) - 1)) is RejectReason.TOO_LARGE_BYTES


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_short_is_truncated(name: str, share: float) -> None:
    data = WHOLE[name]
    assert reason(data[: int(len(data) * share)]) is RejectReason.TRUNCATED


@pytest.mark.parametrize("seed", range(20))
def test_a_png_with_flipped_bits_is_corrupt(seed: int) -> None:
    source = random.Random(seed)
    data = bytearray(WHOLE["png"])
    for _ in range(5):
        data[source.randrange(64, len(data) - 64)] ^= 1 << source.randrange(8)
    assert reason(bytes(data)) is RejectReason.CORRUPT


def test_a_wrong_checksum_of_png_pixels_is_corrupt_and_of_the_end_is_not() -> None:
    data = WHOLE["png"]
    body = data.index(b"IDAT") + 200
    assert reason(data[:body] + bytes([data[body] ^ 1]) + data[body + 1 :]) is RejectReason.CORRUPT
    assert decode(data[:-1] + bytes([data[-1] ^ 1]), LIMITS)[1].format == "png"


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        bytes(4096),
        random.Random(1).randbytes(4096),
        b"just text, whatever its name says\n" * 20,
        b"<!doctype html><html><title>404 Not Found</title></html>",
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch /tmp/x) (w) file\n",
        b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0,0,0,0,0,0,0,0};\n",
        b"PK\x03\x04" + bytes(60),
        b"\x1f\x8b\x08" + bytes(60),
        b"MZ" + bytes(200),
        b"DDS " + bytes(200),
        b"8BPS\x00\x01" + bytes(60),
        b"P6 100000 100000 255\n" + bytes(100),
        b"\x00\x00\x00\x20ftypheic" + bytes(60),
        b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(60),
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"II*\x00",
        b"RIFF\x00\x00\x00\x00WEBPVP8 ",
        encoded(PICTURE, "ICO"),
        encoded(PICTURE, "TGA"),
        encoded(PICTURE, "PPM"),
        encoded(PICTURE, "PCX"),
        encoded(PICTURE, "JPEG2000"),
        encoded(PICTURE, "AVIF"),
    ],
    ids=lambda data: repr(data[:8]),
)
def test_what_is_no_accepted_image_is_an_unsupported_format(data: bytes) -> None:
    assert reason(data) is RejectReason.UNSUPPORTED_FORMAT


def _with_size(data: bytes, at: int, form: str, width: int, height: int) -> bytes:
    return data[:at] + struct.pack(form, width, height) + data[at + struct.calcsize(form) :]


def _jpeg_frame(data: bytes) -> int:
    return data.index(b"\xff\xc0") + 5


@pytest.mark.parametrize(
    "data",
    [
        png(0, 0),
        png(0, 10),
        _with_size(WHOLE["jpeg"], _jpeg_frame(WHOLE["jpeg"]), ">HH", 0, 0),
        _with_size(WHOLE["bmp"], 18, "<ii", 0, 0),
        _with_size(WHOLE["webp"], 26, "<HH", 0, 0),
        tiff({256: (3, [0]), 257: (3, [0]), 258: (3, [8]), 262: (3, [1]), 273: (4, [8]), 279: (4, [1])}, b"x"),
    ],
    ids=["png", "png_width", "jpeg", "bmp", "webp", "tiff"],
)
def test_a_header_without_pixels_is_an_unsupported_format(data: bytes) -> None:
    assert reason(data) is RejectReason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(
    "data",
    [
        png(10_000, 10_000, bits=1),
        png(60_000, 60_000),
        png(2**31 - 1, 2**31 - 1),
        png(1, 20_000),
        png(20_000, 1),
        _with_size(WHOLE["jpeg"], _jpeg_frame(WHOLE["jpeg"]), ">HH", 65_535, 65_535),
        _with_size(WHOLE["bmp"], 18, "<ii", 65_535, 65_535),
        _with_size(WHOLE["gif"], 6, "<HH", 65_535, 65_535),
        _with_size(WHOLE["webp"], 26, "<HH", 16_383, 16_383),
        WHOLE["webp_lossless"][:21] + struct.pack("<I", 16_382 | 16_382 << 14) + WHOLE["webp_lossless"][25:],
        tiff({256: (4, [90_000]), 257: (4, [90_000]), 258: (3, [8]), 262: (3, [1]), 273: (4, [8]), 279: (4, [1])}),
    ],
    ids=["1bit", "60k", "2^31", "tall", "wide", "jpeg", "bmp", "gif", "webp", "webp_lossless", "tiff"],
)
def test_too_many_pixels_are_refused_from_the_header(data: bytes) -> None:
    # None of these holds the pixels it claims: loading would have called it truncated or corrupt.
    assert reason(data) is RejectReason.TOO_MANY_PIXELS


def test_a_bomb_that_would_decode_is_refused_by_its_header() -> None:
    bomb = png(10_000, 10_000, bits=1, body=zlib.compress(bytes(10_000 * (10_000 // 8 + 1))))
    assert len(bomb) < 20_000
    assert reason(bomb) is RejectReason.TOO_MANY_PIXELS
    assert decode(bomb, LimitSettings(max_pixels=10**9))[1].width == 10_000


def test_a_canvas_of_webp_is_refused_before_pillow_makes_room_for_it() -> None:
    flags_and_canvas = bytes(4) + (16_000).to_bytes(3, "little") + (16_000).to_bytes(3, "little")
    animated = animation("WEBP")
    at = animated.index(b"VP8X") + 8
    assert reason(animated[:at] + flags_and_canvas + animated[at + 10 :]) is RejectReason.TOO_MANY_PIXELS


def test_a_huge_tile_in_a_small_tiff_is_a_bomb() -> None:
    tags = {256: (3, [64]), 257: (3, [64]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]), 277: (3, [1])}
    tiles = {322: (4, [16_000]), 323: (4, [16_000]), 324: (4, [8]), 325: (4, [20])}
    assert reason(tiff(tags | tiles, bytes(20))) is RejectReason.TOO_MANY_PIXELS


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (63, 64)])
def test_a_side_under_the_limit_is_too_small(size: tuple[int, int]) -> None:
    data = encoded(pixels(*size), "PNG")
    assert reason(data, LimitSettings(min_side=64)) is RejectReason.TOO_SMALL
    assert decode(data, LIMITS)[1].width == size[0]


@pytest.mark.parametrize(
    "extra",
    [
        png_chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(80_000_000))),
        png_chunk(b"iCCP", b"bomb\0\0" + zlib.compress(bytes(80_000_000))),
        png_chunk(b"iTXt", b"bomb\0\1\0\0\0" + zlib.compress(bytes(80_000_000))),
    ],
    ids=["zTXt", "iCCP", "iTXt"],
)
def test_a_text_or_profile_bomb_is_corrupt(extra: bytes) -> None:
    assert reason(png(10, 10, body=zlib.compress(bytes(110)), extra=extra)) is RejectReason.CORRUPT


def test_many_small_text_chunks_are_read() -> None:
    extra = b"".join(png_chunk(b"iTXt", b"k%d\0\0\0\0\0v" % n) for n in range(20_000))
    assert decode(png(10, 10, body=zlib.compress(bytes(110)), extra=extra), LIMITS)[1].width == 10


def test_a_twelve_bit_jpeg_is_an_unsupported_format() -> None:
    at = _jpeg_frame(WHOLE["jpeg"]) - 1
    assert reason(WHOLE["jpeg"][:at] + b"\x0c" + WHOLE["jpeg"][at + 1 :]) is RejectReason.UNSUPPORTED_FORMAT


def test_the_detail_names_the_format_and_what_pillow_said() -> None:
    with pytest.raises(ImageRejectedError, match=r"^truncated: jpeg: image file is truncated") as caught:
        decode(WHOLE["jpeg"][:3000], LIMITS)
    assert isinstance(caught.value.__cause__, OSError)


def test_memory_that_a_damaged_length_asks_for_is_corrupt() -> None:
    assert reason_for(MemoryError(), "bmp", WHOLE["bmp"]) is RejectReason.CORRUPT
    assert MemoryError in PILLOW_ERRORS


def test_warnings_turned_into_errors_do_not_change_who_is_to_blame() -> None:
    warning = Image.DecompressionBombWarning("large")
    assert reason_for(warning, "gif", WHOLE["gif"]) is RejectReason.TOO_MANY_PIXELS
    assert reason_for(UserWarning("Corrupt EXIF data"), "jpeg", WHOLE["jpeg"]) is RejectReason.CORRUPT


def _damaged(data: bytes, source: random.Random) -> bytes:
    copy = bytearray(data)
    reach = len(copy) if source.random() < 0.5 else min(len(copy), 700)
    for _ in range(source.choice((1, 3, 10, 40))):
        copy[source.randrange(reach)] = source.choice((0, 1, 127, 128, 255, source.randrange(256)))
    if source.random() < 0.3:
        cut = source.randrange(len(copy))
        copy[cut : cut + source.randrange(1, 64)] = b""
    return bytes(copy)


def test_two_thousand_damaged_files_give_pixels_or_a_reason() -> None:
    source = random.Random(20_407)
    ends: Counter[str] = Counter()
    for _ in range(2_000):
        name = source.choice(list(WHOLE))
        try:
            crop, _ = decode(_damaged(WHOLE[name], source), LIMITS)
        except ImageRejectedError as error:
            ends[error.reason] += 1
        else:
            assert crop.shape == (224, 224, 3)
            ends["judged"] += 1
    expected = {"judged", "corrupt", "truncated", "unsupported_format", "too_many_pixels"}
    assert set(ends) == expected


SIGNATURES = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0+", b"RIFF\0\0\0\0WEBPVP8X"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(signature=st.sampled_from(SIGNATURES), body=st.binary(max_size=300))
def test_anything_behind_a_signature_gives_pixels_or_a_reason(signature: bytes, body: bytes) -> None:
    with contextlib.suppress(ImageRejectedError):  # any other exception fails the test
        assert decode(signature + body, LIMITS)[0].shape == (224, 224, 3)


def test_a_file_of_several_frames_is_judged_by_its_first() -> None:
    alone = encoded(pixels(300, 260, 0), "PNG")
    assert (decode(animation("PNG"), LIMITS)[0] == decode(alone, LIMITS)[0]).all()
    with Image.open(io.BytesIO(animation("PNG"))) as image:
        assert image.format == "PNG"
