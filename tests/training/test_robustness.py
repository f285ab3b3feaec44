from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from torchvision.transforms import CenterCrop

from code_worker.errors import ConfigurationError, ImageRejectedError
from code_worker.images.decode import decode
from code_worker.settings import LimitSettings
from code_worker.training.evaluation.robustness import PRESETS, Condition, conditions, make_crop
from tests.image_files import encoded, pixels

LIMITS = LimitSettings()
SIZES = ((310, 427), (900, 300), (120, 90))


def transformed() -> Iterator[Condition]:
    for preset in PRESETS.values():
        yield from (one for one in preset if one.transform is not None)


def crop(condition: Condition, data: bytes) -> NDArray[np.uint8]:
    assert condition.transform is not None
    return make_crop(condition.transform, LIMITS)(data)


def named(key: str) -> Condition:
    return next(one for one in transformed() if one.key == key)


def centre(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(CenterCrop(224)(image.convert("RGB")))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("condition", list(transformed()), ids=lambda one: one.key)
def test_every_transform_gives_a_crop_that_differs_and_is_the_same_again(
    condition: Condition, size: tuple[int, int]
) -> None:
    data = encoded(pixels(*size), "PNG")
    made = crop(condition, data)
    assert made.shape == (224, 224, 3)
    assert made.dtype == np.uint8
    assert np.array_equal(made, crop(condition, data))
    if condition.key != "augm":
        assert not np.array_equal(made, decode(data, LIMITS)[0])


@pytest.mark.parametrize("quality", [95, 90, 50, 30])
def test_jpeg_compresses_the_whole_image_not_the_crop(quality: int) -> None:
    image = pixels(641, 427)
    made = crop(named(f"jpeg_{quality}"), encoded(image, "PNG"))
    assert np.array_equal(made, centre(recompressed(image, quality)))
    assert not np.array_equal(made, centre(recompressed(CenterCrop(224)(image), quality)))


@pytest.mark.parametrize("sigma", [2, 4])
def test_blur_is_a_gaussian_of_that_many_pixels_per_channel(sigma: int) -> None:
    image = pixels(300, 280)
    down = gaussian_filter1d(np.asarray(image), sigma, axis=0)
    expected = gaussian_filter1d(down, sigma, axis=1)
    assert np.array_equal(crop(named(f"blur_{sigma}"), encoded(image, "PNG")), centre(Image.fromarray(expected)))


def test_blur_comes_before_compression() -> None:
    data = encoded(pixels(400, 300), "PNG")
    blurred = Image.fromarray(np.asarray(pixels(400, 300)))
    made = crop(named("blur_2_jpeg_50"), data)
    step = gaussian_filter1d(gaussian_filter1d(np.asarray(blurred), 2, axis=0), 2, axis=1)
    assert np.array_equal(made, centre(recompressed(Image.fromarray(step), 50)))


@pytest.mark.parametrize(("key", "longest", "quality"), [("768px_q60", 768, 60), ("512px_q40", 512, 40)])
@pytest.mark.parametrize("size", SIZES)
def test_delivery_makes_smaller_and_never_larger(key: str, longest: int, quality: int, size: tuple[int, int]) -> None:
    image = pixels(*size)
    factor = min(1.0, longest / max(size))
    smaller = (
        image
        if factor == 1
        else image.resize((round(size[0] * factor), round(size[1] * factor)), Image.Resampling.LANCZOS)
    )
    assert max(smaller.size) <= longest
    made = crop(named(key), encoded(image, "PNG"))
    assert np.array_equal(made, centre(recompressed(smaller, quality)))


def test_an_extreme_format_survives_being_made_smaller() -> None:
    assert crop(named("512px_q40"), encoded(pixels(3000, 1), "PNG")).shape == (224, 224, 3)


def test_the_augmentation_is_chosen_by_the_content() -> None:
    files = [encoded(pixels(260, 240, seed), "PNG") for seed in range(12)]
    changed = [not np.array_equal(crop(named("augm"), data), decode(data, LIMITS)[0]) for data in files]
    differences = {
        round(float(np.abs(crop(named("augm"), data).astype(int) - decode(data, LIMITS)[0]).mean()), 3)
        for data in files
    }
    assert sum(changed) >= 9, "one augmentation each; a few may leave the centre as it is"
    assert len(differences) >= 6, "not the same for all"


def test_what_is_no_image_is_rejected_as_everywhere() -> None:
    with pytest.raises(ImageRejectedError):
        crop(named("jpeg_50"), b"no image at all, and long enough")


def keys(*presets: str, variants: tuple[str, ...] = ()) -> list[str]:
    return [one.key for one in conditions(presets, variants)]


def test_presets_have_the_conditions_they_are_known_for() -> None:
    assert keys("clean") == ["clean"]
    assert keys("d3") == ["no_augm", "augm"]
    sidbench = ["clean", "jpeg_95", "jpeg_90", "jpeg_50", "jpeg_30", "blur_2", "blur_4", "blur_2_jpeg_50"]
    assert keys("sidbench") == sidbench
    assert keys("delivery", "clean") == ["clean", "768px_q60", "512px_q40"]
    assert len(keys(*PRESETS)) == len(set(keys(*PRESETS))), "each once"


def test_a_data_set_with_variants_of_its_own_is_judged_as_it_is() -> None:
    found = conditions(["d3"], ("augm", "no_augm"))
    assert [(one.key, one.variant, one.transform) for one in found] == [
        ("no_augm", "no_augm", None),
        ("augm", "augm", None),
    ]


@pytest.mark.parametrize("presets", [["clean", "instagram"], []])
def test_an_unknown_preset_is_refused_and_the_known_ones_named(presets: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="clean, d3, delivery, sidbench"):
        conditions(presets)
