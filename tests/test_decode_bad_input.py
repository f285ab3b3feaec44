"""Limits that are set, and what a refusal says; what becomes of bad files of every kind is told by tests/corpus."""

from __future__ import annotations

import contextlib
import io
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from code_worker.errors import ImageRejectedError
from code_worker.images import pillow
from code_worker.images.damage import reason_for
from code_worker.images.decode import decode
from code_worker.images.readers import PILLOW_ERRORS, UnsupportedImageError
from code_worker.settings import LimitSettings
from code_worker.types import RejectReason
from tests.image_files import animation, encoded, pixels, png, tiff

LIMITS = LimitSettings()
PICTURE = pixels(300, 260)
WHOLE = {kind: encoded(PICTURE, kind.upper()) for kind in ("jpeg", "png", "gif", "bmp")}


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


def test_a_bomb_that_would_decode_is_refused_by_its_header() -> None:
    bomb = png(10_000, 10_000, bits=1, body=zlib.compress(bytes(10_000 * (10_000 // 8 + 1))))
    assert len(bomb) < 20_000
    assert reason(bomb) is RejectReason.TOO_MANY_PIXELS
    assert decode(bomb, LimitSettings(max_pixels=10**9))[1].width == 10_000


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (63, 64)])
def test_a_side_under_the_limit_is_too_small(size: tuple[int, int]) -> None:
    data = encoded(pixels(*size), "PNG")
    assert reason(data, LimitSettings(min_side=64)) is RejectReason.TOO_SMALL
    assert decode(data, LIMITS)[1].width == size[0]


def test_the_detail_names_the_format_and_what_pillow_said() -> None:
    with pytest.raises(ImageRejectedError, match=r"^truncated: jpeg: image file is truncated") as caught:
        decode(WHOLE["jpeg"][:3000], LIMITS)
    assert isinstance(caught.value.__cause__, OSError)


def test_memory_that_a_damaged_length_asks_for_is_corrupt() -> None:
    assert reason_for(MemoryError(), "bmp", WHOLE["bmp"], ran_out=False) is RejectReason.CORRUPT
    assert MemoryError in PILLOW_ERRORS


def test_warnings_turned_into_errors_do_not_change_who_is_to_blame() -> None:
    warning = pillow.Image.DecompressionBombWarning("large")
    assert reason_for(warning, "gif", WHOLE["gif"], ran_out=False) is RejectReason.TOO_MANY_PIXELS
    other = UserWarning("Corrupt EXIF data")
    assert reason_for(other, "jpeg", WHOLE["jpeg"], ran_out=False) is RejectReason.CORRUPT


@pytest.mark.parametrize("words", ["", "image file is truncated", "unsupported", "cannot handle 12-bit layers"])
@pytest.mark.parametrize("kind", WHOLE)
def test_the_words_of_an_error_decide_nothing(kind: str, words: str) -> None:
    data = WHOLE[kind]
    for error in (OSError(words), SyntaxError(words), EOFError(words)):
        assert reason_for(error, kind, data, ran_out=False) is RejectReason.CORRUPT
    unsupported = UnsupportedImageError(words)
    assert reason_for(unsupported, kind, data, ran_out=False) is RejectReason.UNSUPPORTED_FORMAT
    if kind != "png":
        assert reason_for(OSError(words), kind, data, ran_out=True) is RejectReason.TRUNCATED


def _bmp(at: int, value: int) -> bytes:
    return WHOLE["bmp"][:at] + bytes((value,)) + WHOLE["bmp"][at + 1 :]


UNSUPPORTED = {
    "a filter method": png(9, 9)[:27] + b"\1" + png(9, 9)[28:],
    "a kind of colour": png(9, 9, colour=5),
    "a header of another size": _bmp(14, 41),
    "a depth": _bmp(28, 17),
    "a compression": _bmp(30, 4),
    "twelve bits": WHOLE["jpeg"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1),
    "a photometric interpretation": tiff({256: (3, [9]), 257: (3, [9]), 258: (3, [8]), 262: (3, [77])}, b"x"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_not_read_is_told_from_what_is_damaged(what: str) -> None:
    assert reason(UNSUPPORTED[what]) is RejectReason.UNSUPPORTED_FORMAT


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
