"""The eight views: which is which, what torchvision makes of the same image, and that chance comes from one place."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from code_worker.training.fitting import batches as views_module
from code_worker.training.fitting.augment import Augmenter
from code_worker.training.fitting.batches import GLOBAL_SCALE, LOCAL_SCALE, ViewSettings, record_views
from code_worker.training.fitting.objective import VIEWS
from tests.image_files import pixels

PLAIN = [VIEWS.index("real"), VIEWS.index("fake")]
DECILES = np.linspace(0, 1, 11)
BICUBIC = v2.InterpolationMode.BICUBIC


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def coordinates(width: int, height: int) -> Image.Image:
    """A picture in which every pixel tells its place: red its column, green its row, blue the carries of both."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], axis=-1).astype(np.uint8))


def place(view: NDArray[np.uint8]) -> tuple[int, int]:
    """Column and row of the first pixel of a part of `coordinates`."""
    red, green, blue = view[0, 0].tolist()
    return blue // 16 * 256 + red, blue % 16 * 256 + green


def distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("size", [16, 48, 224])
@pytest.mark.parametrize("resize", [True, False])
def test_a_record_gives_eight_views_real_ones_first(size: int, resize: bool) -> None:
    assert len(VIEWS) == 8
    red, blue = Image.new("RGB", (300, 260), "red"), Image.new("RGB", (230, 300), "blue")
    views = record_views(red, blue, chance(), ViewSettings(size, resize=resize))
    assert views.shape == (8, size, size, 3)
    assert views.dtype == np.uint8
    assert (views[PLAIN[0]] == (255, 0, 0)).all()
    assert (views[PLAIN[1]] == (0, 0, 255)).all()
    others = record_views(red, red, chance(), ViewSettings(size, resize=resize))
    assert np.array_equal(others[:4], views[:4])
    assert not (others[4:] == views[4:]).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize("sides", [(512, 512), (640, 480), (360, 640), (256, 256), (90, 130), (247, 248), (100, 400)])
@pytest.mark.parametrize("size", [224, 150])
def test_plain_views_are_those_of_torchvision(sides: tuple[int, int], size: int) -> None:
    image = pixels(*sides)
    expected = v2.Compose([v2.Resize(int(size / 0.9), interpolation=BICUBIC), v2.CenterCrop(size)])(image)
    views = record_views(image, image, chance(), ViewSettings(size))
    for view in views[PLAIN]:
        assert distance(view, np.asarray(expected)) <= 2
        assert (view != np.asarray(expected)).mean() < 0.01


def test_augmentations_come_before_the_last_stretch() -> None:
    image = pixels(150, 130)
    published = v2.Compose([v2.Resize(71, interpolation=BICUBIC), v2.CenterCrop(64)])
    for seed in range(25):
        expected = np.asarray(published(Augmenter(64)(image, chance(seed))))
        view = record_views(image, image, chance(seed), ViewSettings(64))[VIEWS.index("real_augmented")]
        assert distance(view, expected) <= 2


def test_a_photograph_reduced_first_looks_the_same() -> None:
    image = pixels(1500, 1100)
    expected = v2.Compose([v2.Resize(int(100 / 0.9), interpolation=BICUBIC), v2.CenterCrop(100)])(image)
    view = record_views(image, image, chance(), ViewSettings(100))[0]
    assert np.abs(view.astype(int) - np.asarray(expected).astype(int)).mean() < 1.5


@pytest.mark.parametrize(
    ("sides", "target"), [((512, 300), (248, 145)), ((40, 60), (224, 224)), ((224, 224), (48, 48))]
)
def test_stretching_is_that_of_pillow(sides: tuple[int, int], target: tuple[int, int]) -> None:
    image = pixels(*sides)
    expected = np.asarray(image.resize(target, Image.Resampling.BICUBIC))
    assert distance(views_module._stretched(image, *target), expected) <= 1


@pytest.mark.parametrize("scale", [GLOBAL_SCALE, LOCAL_SCALE])
@pytest.mark.parametrize("sides", [(512, 512), (640, 360)])
def test_random_crops_are_as_large_and_as_long_as_torchvisions(
    scale: tuple[float, float], sides: tuple[int, int]
) -> None:
    rng, (width, height) = chance(1), sides
    boxes = np.array([views_module._random_box(sides, scale, rng) for _ in range(3000)])
    torch.manual_seed(1)
    blank = torch.empty(3, height, width)
    published = v2.RandomResizedCrop(8, scale=scale)
    theirs = np.array([list(published.make_params([blank]).values()) for _ in range(3000)])
    tops, lefts, heights, widths = theirs.T
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = across * down / (width * height)
    assert scale[0] * 0.97 <= areas.min()
    assert areas.max() <= scale[1] * 1.03
    assert (across / down).min() > 0.74
    assert (across / down).max() < 1.35
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= width
    assert boxes[:, 3].max() <= height
    for ours, others in (
        (areas, heights * widths / (width * height)),
        (across / down, widths / heights),
        (boxes[:, 0] / width, lefts / width),
        (boxes[:, 1] / height, tops / height),
    ):
        assert np.quantile(ours, DECILES) == pytest.approx(np.quantile(others, DECILES), abs=0.04)


def test_a_strip_gives_its_middle() -> None:
    assert views_module._random_box((1000, 60), GLOBAL_SCALE, chance()) == (460, 0, 540, 60)
    assert views_module._random_box((60, 1000), GLOBAL_SCALE, chance()) == (0, 460, 60, 540)


def test_global_views_show_more_than_local_ones() -> None:
    image = coordinates(250, 250)
    spans: dict[str, list[int]] = {"global": [], "local": []}
    for seed in range(60):
        views = record_views(image, image, chance(seed), ViewSettings(64))
        for name, found in spans.items():
            columns = views[VIEWS.index(f"real_{name}"), 32, :, 0].astype(int)
            found.append(int(columns.max() - columns.min()))
    assert np.median(spans["global"]) > 1.4 * np.median(spans["local"])


def test_native_plain_views_are_cut_out_untouched_from_anywhere() -> None:
    image = coordinates(80, 70)
    lefts, tops = set(), set()
    for seed in range(150):
        views = record_views(image, image, chance(seed), ViewSettings(50, resize=False))
        for view in views[PLAIN]:
            left, top = place(view)
            assert np.array_equal(view, np.asarray(image)[top : top + 50, left : left + 50])
            lefts.add(left)
            tops.add(top)
    assert lefts == set(range(31))
    assert tops == set(range(21))


def test_native_augmented_views_come_from_a_window_of_twice_the_size() -> None:
    image = coordinates(900, 900)
    untouched = 0
    for seed in range(30):
        view = record_views(image, image, chance(seed), ViewSettings(40, resize=False))[1]
        left, top = place(view)
        untouched += np.array_equal(view, np.asarray(image)[top : top + 40, left : left + 40])
    # A third is drawn no augmentation.
    assert 4 < untouched < 20


def test_native_global_and_local_views_show_one_window_half_as_wide_again() -> None:
    image = coordinates(250, 250)
    seen = []
    for seed in range(40):
        views = record_views(image, image, chance(seed), ViewSettings(40, resize=False))
        for column in (views[VIEWS.index(f"fake_{name}")][..., 0] for name in ("global", "local")):
            if column.min() > 0:  # nothing black came in
                seen.append(int(column.max()) - int(column.min()))
    assert len(seen) > 20
    # Whatever augmentations did to a few colours.
    assert np.median(seen) < 1.5 * 40


@pytest.mark.parametrize("sides", [(100, 31), (31, 100), (20, 33), (17, 16)])
def test_a_native_view_of_a_small_image_is_padded_as_inference_does(sides: tuple[int, int]) -> None:
    image = pixels(*sides)
    view = record_views(image, image, chance(), ViewSettings(100, resize=False))[0]
    assert np.array_equal(view, np.asarray(v2.CenterCrop(100)(image)))


@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("size", [48, 224])
def test_equal_generators_give_equal_views_and_no_other_chance_is_asked(resize: bool, size: int) -> None:
    real, fake, settings = pixels(300, 260), pixels(256, 256, 1), ViewSettings(size, resize=resize)
    np.random.seed(1)
    states = (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tobytes(),
        torch.get_rng_state().tolist(),
    )
    first = [record_views(real, fake, chance(seed), settings) for seed in range(5)]
    again = [record_views(real, fake, chance(seed), settings) for seed in range(5)]
    assert np.array_equal(first, again)
    assert len({views[1:].tobytes() for views in first}) == 5
    assert (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tobytes(),
        torch.get_rng_state().tolist(),
    ) == states


def test_a_generator_taken_up_again_repeats_the_views_to_come() -> None:
    real, fake, rng = pixels(120, 100), pixels(110, 90, 1), chance(7)
    record_views(real, fake, rng, ViewSettings(48))
    state = rng.bit_generator.state
    expected = record_views(real, fake, rng, ViewSettings(48))
    resumed = chance(0)
    resumed.bit_generator.state = state
    assert np.array_equal(record_views(real, fake, resumed, ViewSettings(48)), expected)


@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("sides", [(1, 1), (1, 300), (700, 3), (5000, 20), (15, 16)])
def test_images_of_any_form_have_views(sides: tuple[int, int], resize: bool) -> None:
    for seed in range(15):
        image = pixels(*sides)
        assert record_views(image, image, chance(seed), ViewSettings(32, resize=resize)).any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_images_of_any_mode_have_views(mode: str) -> None:
    image = pixels(80, 70).convert(mode)
    expected = record_views(image.convert("RGB"), image.convert("RGB"), chance(), ViewSettings(48))
    assert np.array_equal(record_views(image, image, chance(), ViewSettings(48)), expected)


def test_a_view_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 pixels wide, not 15"):
        ViewSettings(15)
