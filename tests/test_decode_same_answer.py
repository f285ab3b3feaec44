"""What the published pipeline takes is judged, what it refuses is refused, whatever the process has switched over."""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin
from torchvision.transforms import CenterCrop

from code_worker.errors import ImageRejectedError
from code_worker.images.decode import decode, decode_crop, decode_whole
from code_worker.settings import LimitSettings
from code_worker.types import RejectReason
from tests.corpus.fuzz import made
from tests.corpus.pictures import pictures
from tests.image_files import encoded, pixels, png, png_chunk, tiff, valid_files
from tests.process_switches import PILLOW

LIMITS = LimitSettings()
SIDE, BOTTOM = 700, 462  # rows of the images below, and the first row behind their crop
Answer = NDArray[np.uint8] | None


@cache
def published(data: bytes) -> Answer:
    """The crop that Pillow and torchvision give; None for a file that they refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(CenterCrop(224)(image.convert("RGB")))
        except Exception:  # noqa: BLE001 - whatever a damaged file brings about: that Pillow raised is the answer
            return None


def answered(data: bytes) -> Answer:
    try:
        return decode_crop(data, LIMITS)
    except ImageRejectedError:
        return None


def segments(data: bytes, marker: int, bodies: Iterator[bytes]) -> bytes:
    """A JPEG with segments put in behind its first marker."""
    made = b"".join(b"\xff" + bytes((marker,)) + struct.pack(">H", len(body) + 2) + body for body in bodies)
    return data[:2] + made + data[2:]


def resource(size: int) -> bytes:
    """One item of an image resource block of Photoshop's."""
    return b"8BIM\x04\x04\0\0" + struct.pack(">L", size) + bytes(size)


def rows(count: int, filters: dict[int, int] | None = None) -> bytes:
    """Rows of grey of a PNG 300 pixels wide; by default of no filter."""
    grey = np.asarray(pixels(300, count).convert("L"))
    return b"".join(bytes(((filters or {}).get(number, 0),)) + row.tobytes() for number, row in enumerate(grey))


def scanned_twice(data: bytes) -> bytes:
    """A JPEG of one scan with that scan once more: libjpeg refuses the second when all rows are there."""
    at = data.index(b"\xff\xda")
    return data[:-2] + data[at:]


def _odd() -> dict[str, bytes]:
    jpeg, progressive = (encoded(pixels(640, 480), "JPEG", progressive=order) for order in (False, True))
    grey = encoded(pixels(640, 480).convert("L"), "JPEG")
    body = rows(SIDE)
    packed = zlib.compress(body, 1)
    crop_at = packed[: len(packed) * BOTTOM // SIDE]
    return {
        "jpeg_without_end": jpeg[:-2],
        "jpeg_without_end_then_text": jpeg[:-2] + b"what a camera adds " * 20,
        "jpeg_without_end_then_zeros": jpeg[:-2] + bytes(70_000),
        "jpeg_cut_then_text": jpeg[: len(jpeg) // 2] + b"text " * 100,
        "jpeg_cut_then_end": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "jpeg_cut": jpeg[: len(jpeg) // 2],
        "jpeg_grey_without_end_then_text": grey[:-2] + b"text " * 100,
        "jpeg_progressive_without_end_then_text": progressive[:-2] + b"text " * 100,
        "jpeg_progressive_cut_then_text": progressive[: len(progressive) // 2] + b"text " * 100,
        "jpeg_scanned_twice": scanned_twice(encoded(pixels(300, 300), "JPEG")),
        "jpeg_tables_behind_its_scan": jpeg[:-2] + b"\xff\xc4\0\5\xff\xff\xff" + b"\xff\xd9",
        "jpeg_photoshop_megabyte": segments(jpeg, 0xED, (b"Photoshop 3.0\0" + resource(65_000) for _ in range(16))),
        "jpeg_photoshop_cut": segments(jpeg, 0xED, iter([b"Photoshop 3.0\0" + resource(65_000)[:-9]])),
        "jpeg_photoshop_cut_in_a_name": segments(jpeg, 0xED, iter([b"Photoshop 3.0\x008BIM\0\0"])),
        "jpeg_exif_300_segments": segments(jpeg, 0xE1, (b"Exif\0\0" + bytes(100) for _ in range(300))),
        "png_plain": png(300, SIDE, body=packed),
        "png_wrong_sum": png(300, SIDE, body=packed[:-4] + b"\0\0\0\0"),
        "png_without_sum": png(300, SIDE, body=packed[:-4]),
        "png_filter_9_below_the_crop": png(300, SIDE, body=zlib.compress(rows(SIDE, {BOTTOM + 100: 9}))),
        "png_filter_9_in_the_crop": png(300, SIDE, body=zlib.compress(rows(SIDE, {BOTTOM - 100: 9}))),
        "png_filter_9_above_the_crop": png(300, SIDE, body=zlib.compress(rows(SIDE, {3: 9}))),
        "png_stream_ends_below_the_crop": png(300, SIDE, body=zlib.compress(rows(BOTTOM + 20))),
        "png_stream_ends_in_the_crop": png(300, SIDE, body=zlib.compress(rows(BOTTOM - 20))),
        "png_stream_is_cut": png(300, SIDE, body=packed[:-2000]),
        "png_stream_is_cut_below_the_crop": png(300, SIDE, body=crop_at + packed[len(crop_at) : -3000]),
        "png_stream_is_damaged_below_the_crop": png(300, SIDE, body=packed[:-900] + bytes(100) + packed[-800:]),
        "png_stream_goes_on": png(300, SIDE, body=zlib.compress(rows(SIDE + 200))),
        "png_bytes_behind_its_stream": png(300, SIDE, body=packed + b"more"),
        "png_unknown_kind": png(300, SIDE, colour=5, body=packed),
    }


ODD = _odd()
TAKEN = {"jpeg_without_end_then_text", "jpeg_photoshop_megabyte", "jpeg_exif_300_segments", "png_stream_goes_on"}
REFUSED = {"png_wrong_sum", "png_filter_9_below_the_crop", "png_stream_is_cut", "jpeg_scanned_twice"}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_ends_as_with_the_published_pipeline(name: str) -> None:
    np.testing.assert_equal(answered(ODD[name]), published(ODD[name]))


def test_odd_files_are_of_both_kinds() -> None:
    assert all(published(ODD[name]) is not None for name in TAKEN)
    assert all(published(ODD[name]) is None for name in REFUSED)


def test_files_that_were_changed_at_random_end_as_with_the_published_pipeline() -> None:
    files = [data for data in pictures().values() if len(data) < 50_000]
    ends = {True: 0, False: 0}
    for number in range(500):
        data, _ = made(files, seed=20_411, number=number)
        try:
            found: Answer = decode_crop(data, LIMITS)
        except ImageRejectedError as error:
            # Our own bounds are no answer about the file.
            if error.reason is RejectReason.TOO_MANY_PIXELS:
                continue
            found = None
        np.testing.assert_equal(found, published(data), err_msg=f"file {number}")
        ends[found is None] += 1
    assert min(ends.values()) > 80


def test_items_of_photoshop_are_counted_and_not_their_bytes() -> None:
    many = segments(
        encoded(pixels(300, 300), "JPEG"),
        0xED,
        (b"Photoshop 3.0\0" + resource(0) * 5_000 for _ in range(14)),
    )
    with pytest.raises(ImageRejectedError, match="too many parts"):
        decode_crop(many, LIMITS)


@cache
def before() -> dict[str, tuple[bytes, str]]:
    """Name → file and end, while every switch is as Pillow comes."""
    some = [name for number, name in enumerate(valid_files()) if number % 3 == 0 or "gif" in name]
    files = ODD | {name: valid_files()[name]() for name in some} | _switched()
    return {name: (data, end(data)) for name, data in files.items()}


def _switched() -> dict[str, bytes]:
    """Files that each switch changes the fate of, beside those above."""
    text = png_chunk(b"tEXt", b"a\0" + b"b" * 2_000) + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 2_000))
    wide = encoded(pixels(300, 300).convert("RGBA"), "BMP")
    return {
        "png_texts": png(300, SIDE, body=zlib.compress(rows(SIDE)), extra=text),
        "png_wrong_sum_of_text": png(300, 9, body=zlib.compress(rows(9)), extra=text[:-1] + b"\0"),
        "bmp_32": wide,
        "bmp_32_plain": wide[:14] + struct.pack("<L", 40) + wide[18:30] + bytes(4) + wide[34:],
    }


def end(data: bytes) -> str:
    """The pixels and the facts of a file, or the words in which it was refused."""
    try:
        crop, facts = decode(data, LIMITS)
    except ImageRejectedError as error:
        return str(error)
    return f"{zlib.crc32(crop.tobytes())} {facts}"


@pytest.mark.parametrize("name", PILLOW)
def test_no_switch_of_pillows_changes_an_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = before()
    module, value = PILLOW[name]
    monkeypatch.setattr(module, name, value)
    changed = {name: (was, now) for name, (data, was) in expected.items() if (now := end(data)) != was}
    assert not changed


@pytest.mark.parametrize("action", ["error", "always"])
def test_no_filter_of_warnings_changes_an_answer(action: Any) -> None:
    expected = before()
    with warnings.catch_warnings(record=action == "always") as heard:
        warnings.simplefilter(action)
        changed = {name: (was, now) for name, (data, was) in expected.items() if (now := end(data)) != was}
    assert not changed
    assert not heard


class Heard(logging.Handler):
    """What comes to the handlers of the whole process; pytest's own also hears loggers that keep to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_pillow_logs_nothing_of_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    side = {256: (3, [9]), 257: (3, [9]), 258: (3, [8]), 262: (3, [1]), 277: (3, [60_000])}
    root, heard = logging.getLogger(), Heard()
    level = root.level
    root.addHandler(heard)
    root.setLevel(logging.DEBUG)
    try:
        end(tiff(side | {273: (4, [8]), 279: (4, [1])}, b"x"))
        end(ODD["png_plain"])
    finally:
        root.setLevel(level)
        root.removeHandler(heard)
    assert heard.records == []
    assert capfd.readouterr().err == ""


def test_switches_do_change_what_pillow_itself_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    published.cache_clear()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    try:
        assert published(ODD["jpeg_cut"]) is not None
    finally:
        published.cache_clear()


def test_the_applications_pillow_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    seen: list[bool] = []
    real: Callable[..., Any] = ImageFile.ImageFile.load
    decode_crop(ODD["png_plain"], LIMITS)
    seen.append(ImageFile.LOAD_TRUNCATED_IMAGES)
    assert seen == [True]
    assert ImageFile.ImageFile.load is real
    with Image.open(io.BytesIO(ODD["png_plain"])) as image:
        assert type(image) is PngImagePlugin.PngImageFile
    assert isinstance(decode_whole(ODD["png_plain"], LIMITS), Image.Image)
