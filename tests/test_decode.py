"""Decoding gives the pixels that Pillow and torchvision give, and tells what the file was."""

from __future__ import annotations

import hashlib
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import CenterCrop

from code_worker.images.decode import decode, decode_whole, inspect
from code_worker.settings import LimitSettings
from tests.image_files import encoded, exif_orientation, pixels, valid_files

LIMITS = LimitSettings()
FILES = {name: cache(make) for name, make in valid_files().items()}


def reference(data: bytes) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference converts palettes with several alphas under protest
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(CenterCrop(224)(image.convert("RGB")))


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_those_of_pillow_and_torchvision(name: str) -> None:
    crop, _ = decode(FILES[name](), LIMITS)
    assert crop.dtype == np.uint8
    assert crop.shape == (224, 224, 3)
    np.testing.assert_array_equal(crop, reference(FILES[name]()))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 600),
    height=st.integers(1, 600),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]),
)
def test_pixels_equal_for_any_size_and_mode(width: int, height: int, mode: str) -> None:
    data = encoded(pixels(width, height).convert(mode), "PNG", compress_level=1)
    np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))


@pytest.mark.parametrize("name", FILES)
def test_the_whole_image_has_the_same_centre(name: str) -> None:
    whole = decode_whole(FILES[name](), LIMITS)
    np.testing.assert_array_equal(np.asarray(CenterCrop(224)(whole)), decode(FILES[name](), LIMITS)[0])
    with_alpha = decode_whole(FILES[name](), LIMITS, alpha=True)
    assert with_alpha.convert("RGB").tobytes() == whole.tobytes()


def test_the_whole_image_has_its_alpha_when_asked_for() -> None:
    picture = pixels(90, 70)
    assert decode_whole(encoded(picture, "PNG"), LIMITS, alpha=True).mode == "RGB"
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    assert decode_whole(encoded(picture, "PNG"), LIMITS, alpha=True).tobytes() == picture.tobytes()


def test_the_offset_is_rounded_to_the_even_pixel() -> None:
    column = np.arange(256, dtype=np.uint8)
    for width, first in ((225, 0), (227, 2), (229, 2), (231, 4)):
        data = encoded(Image.fromarray(np.tile(column[:width], (224, 1))), "PNG")
        assert decode(data, LIMITS)[0][0, 0, 0] == first


def test_exif_orientation_does_not_turn_a_jpeg() -> None:
    picture = pixels(300, 240)
    turned = encoded(picture, "JPEG", exif=exif_orientation(6))
    np.testing.assert_array_equal(decode(turned, LIMITS)[0], decode(encoded(picture, "JPEG"), LIMITS)[0])


def test_alpha_is_dropped_not_blended() -> None:
    picture = pixels(250, 250)
    clear = picture.copy()
    clear.putalpha(0)
    np.testing.assert_array_equal(
        decode(encoded(clear, "PNG"), LIMITS)[0], decode(encoded(picture, "PNG"), LIMITS)[0]
    )


@pytest.mark.parametrize(
    ("name", "kind", "size", "mode"),
    [
        ("jpeg_641x427", "jpeg", (641, 427), "RGB"),
        ("jpeg_cmyk", "jpeg", (301, 277), "CMYK"),
        ("png_palette_with_alphas", "png", (280, 300), "P"),
        ("png_16bit", "png", (301, 260), "I;16"),
        ("gif_animated", "gif", (300, 260), "P"),
        ("bmp_1", "bmp", (301, 277), "1"),
        ("tiff_CMYK", "tiff", (301, 277), "CMYK"),
        ("webp_RGBA", "webp", (301, 277), "RGBA"),
        ("jpeg_mpo", "mpo", (333, 301), "RGB"),
    ],
)
def test_facts_describe_the_original(name: str, kind: str, size: tuple[int, int], mode: str) -> None:
    data = FILES[name]()
    facts = decode(data, LIMITS)[1]
    assert (facts.format, (facts.width, facts.height), facts.mode) == (kind, size, mode)
    assert (facts.sha256, facts.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_content_hash_that_is_known_is_taken_over_and_changes_nothing_else() -> None:
    data = encoded(pixels(300, 260), "JPEG")
    pixels_with, facts = decode(data, LIMITS, sha256="ab" * 32)
    pixels_without, computed = decode(data, LIMITS)
    np.testing.assert_array_equal(pixels_with, pixels_without)
    assert facts == replace(computed, sha256="ab" * 32)
    assert inspect(data, LIMITS, sha256="ab" * 32) == facts


def test_pillows_own_pixel_limit_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    data = encoded(pixels(160, 160), "PNG")
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    with pytest.raises(Image.DecompressionBombError):
        pixels(160, 160).crop((0, 0, 160, 150))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    large = encoded(pixels(400, 400), "PNG")
    assert decode(large, LIMITS)[1].width == 400


def test_threads_decode_side_by_side() -> None:
    files = [FILES[name]() for name in list(FILES)[::3]]
    with ThreadPoolExecutor(8) as pool:
        crops = list(pool.map(lambda data: decode(data, LIMITS)[0], files))
    for data, crop in zip(files, crops, strict=True):
        np.testing.assert_array_equal(crop, reference(data))
