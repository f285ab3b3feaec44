"""Leaving out what lies outside the crop changes no pixel, and forgives no file that Pillow refuses."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from threading import Thread
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from code_worker.errors import ImageRejectedError
from code_worker.images import region
from code_worker.images.decode import decode
from code_worker.settings import LimitSettings
from tests.image_files import encoded, exif_orientation, pixels
from tests.test_decode import reference

LIMITS = LimitSettings()
SIZES = [(640, 480), (333, 517), (225, 224), (224, 999), (1001, 100), (17, 400), (230, 8)]


def outcome(data: bytes) -> str | bytes:
    """The pixels, or the reason for there being none."""
    try:
        return decode(data, LIMITS)[0].tobytes()
    except ImageRejectedError as error:
        return str(error)


@contextmanager
def pillow_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region, "_decoder", None)
        patch.setattr("code_worker.images.decode.leave_out_rows_below", lambda *_: None)
        yield


def same_as_pillow_alone(data: bytes) -> str | bytes:
    with pillow_alone():
        expected = outcome(data)
    found = outcome(data)
    assert found == expected
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the extension took each file that it was asked for."""
    taken: list[bool] = []
    inner = region._decoder
    assert inner is not None, region.region_decoder()

    def decoder(*arguments: Any) -> bytes | None:
        found = inner(*arguments)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(region, "_decoder", decoder)
    return taken


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_jpeg_has_the_pixels_of_pillow(size: tuple[int, int], subsampling: str, asked: list[bool]) -> None:
    for quality, progressive, restart in product((30, 95), (False, True), (0, 7)):
        data = encoded(
            pixels(*size),
            "JPEG",
            quality=quality,
            subsampling=subsampling,
            progressive=progressive,
            restart_marker_blocks=restart,
        )
        np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))
    assert asked == [True] * 8


def transposed_sampling(data: bytes) -> bytes:
    """A 4:2:2 JPEG whose header says 4:4:0: other pixels, of which both readers must give the same."""
    at = data.index(b"\xff\xc0") + 11
    assert data[at] == 0x21
    return data[:at] + b"\x12" + data[at + 1 :]


def test_rows_may_be_shared_too(asked: list[bool]) -> None:
    data = transposed_sampling(encoded(pixels(400, 400), "JPEG", subsampling="4:2:2"))
    assert isinstance(same_as_pillow_alone(data), bytes)
    assert len(asked) == 1


def test_grey_stays_grey(asked: list[bool]) -> None:
    data = encoded(pixels(500, 300).convert("L"), "JPEG")
    np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))
    assert asked == [True]


def test_what_follows_the_end_is_nobodys_business(asked: list[bool]) -> None:
    data = encoded(pixels(500, 300), "JPEG") + b"a film that a phone adds \xff\xd8\xff\xe1"
    np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))
    assert asked == [True]


def test_a_burst_is_its_first_frame(asked: list[bool]) -> None:
    buffer = io.BytesIO()
    pixels(320, 240).save(buffer, "MPO", save_all=True, append_images=[pixels(320, 240).rotate(180)])
    np.testing.assert_array_equal(decode(buffer.getvalue(), LIMITS)[0], reference(buffer.getvalue()))
    assert asked == [True]


def test_colours_for_print_are_pillows(asked: list[bool]) -> None:
    data = encoded(pixels(300, 300).convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))
    assert asked == []


@pytest.mark.parametrize("sampling", [0x41, 0x14, 0x31, 0x42])
def test_rare_samplings_are_declined(sampling: int, asked: list[bool]) -> None:
    data = bytearray(encoded(pixels(400, 300), "JPEG", subsampling="4:2:2"))
    data[data.index(b"\xff\xc0") + 11] = sampling
    same_as_pillow_alone(bytes(data))
    assert not any(asked)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_short_anywhere_is_refused(progressive: bool) -> None:
    data = encoded(pixels(300, 600), "JPEG", progressive=progressive)
    for size in range(700, len(data), 531):
        assert "truncated" in str(same_as_pillow_alone(data[:size]))
    assert "truncated" in str(same_as_pillow_alone(data[:-1]))


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """A few bytes overwritten, removed or doubled, anywhere."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 5))):
            at, length = int(rng.integers(2, len(changed))), int(rng.integers(1, 40))
            match int(rng.integers(3)):
                case 0:
                    changed[at] = int(rng.integers(256))
                case 1:
                    del changed[at : at + length]
                case _:
                    changed[at:at] = changed[at : at + length]
        yield bytes(changed)


FORMS: dict[str, Callable[[], bytes]] = {
    "baseline": lambda: encoded(pixels(400, 500), "JPEG", quality=80),
    "progressive": lambda: encoded(pixels(300, 400), "JPEG", progressive=True),
    "restarts": lambda: encoded(pixels(400, 400), "JPEG", restart_marker_blocks=3),
    "grey": lambda: encoded(pixels(400, 400).convert("L"), "JPEG"),
    "png": lambda: encoded(pixels(300, 500), "PNG"),
    "tiff": lambda: encoded(pixels(300, 500), "TIFF"),
}


@pytest.mark.parametrize("form", FORMS)
def test_damage_has_the_same_end_as_with_pillow_alone(form: str) -> None:
    ends = [same_as_pillow_alone(data) for data in mutations(FORMS[form](), 120, seed=len(form))]
    assert {type(end) for end in ends} >= {str}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_rows_of_a_tiff_below_the_crop_are_left_out(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = pixels(300, 700)
    wide = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    data = encoded(Image.fromarray(wide) if mode == "I;16" else picture.convert(mode), "TIFF")
    ends = ends_of_tiles(monkeypatch)
    np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))
    assert max(ends) == 462


def ends_of_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last row that Pillow is asked to decode, tile by tile."""
    ends: list[int] = []
    leave_out = region.leave_out_rows_below

    def look(image: Any, size: int, bottom: int) -> None:
        leave_out(image, size, bottom)
        ends.extend(tile.extents[3] for tile in image.tile)

    monkeypatch.setattr("code_worker.images.decode.leave_out_rows_below", look)
    return ends


def turned(picture: Image.Image) -> bytes:
    return encoded(picture, "TIFF", exif=exif_orientation(3))


def interlaced() -> bytes:
    """A grey PNG whose header says that it is interlaced: its rows are too few then, which Pillow forgives or not."""
    data = bytearray(encoded(pixels(300, 700).convert("L"), "PNG"))
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def frames() -> bytes:
    out = io.BytesIO()
    pixels(300, 700).save(out, "PNG", save_all=True, append_images=[pixels(300, 700).rotate(90)])
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        lambda: turned(pixels(300, 700)),
        interlaced,
        frames,
        lambda: encoded(pixels(300, 700), "PNG"),
        lambda: encoded(pixels(300, 700), "TIFF", compression="tiff_lzw"),
        lambda: encoded(pixels(300, 700), "BMP"),
    ],
    ids=["turned", "interlaced", "animated", "png", "compressed", "bmp"],
)
def test_other_files_are_decoded_whole(data: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    ends = ends_of_tiles(monkeypatch)
    same_as_pillow_alone(data())
    assert max(ends) == 700


def test_a_png_damaged_below_the_crop_is_refused_all_the_same() -> None:
    data = bytearray(encoded(pixels(300, 900), "PNG"))
    data[-200] ^= 0xFF
    assert "corrupt" in str(same_as_pillow_alone(bytes(data)))
    assert "truncated" in str(same_as_pillow_alone(bytes(data[:-300])))


def test_a_jpeg_whose_end_is_followed_by_another_scan_is_pillows(asked: list[bool]) -> None:
    data = encoded(pixels(300, 900), "JPEG")
    assert "corrupt" in str(same_as_pillow_alone(data[:-2] + data[data.index(b"\xff\xda") :]))
    assert asked == [False]


def test_threads_decode_side_by_side(asked: list[bool]) -> None:
    files = [encoded(pixels(500, 400 + 20 * number), "JPEG") for number in range(8)]
    found: dict[int, NDArray[np.uint8]] = {}

    def work(number: int) -> None:
        for _ in range(10):
            found[number] = decode(files[number], LIMITS)[0]

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, data in enumerate(files):
        np.testing.assert_array_equal(found[number], reference(data))
    assert asked == [True] * 80
