"""Each augmentation at both ends of its range and where it changes nothing, and how they are drawn."""

from __future__ import annotations

import io
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from code_worker.training.fitting.augment import AUGMENTATIONS, Augmentation, Augmenter
from tests.image_files import pixels

BY_NAME = {augmentation.name: augmentation for augmentation in AUGMENTATIONS}
PUBLISHED = [
    ("blur", 0.1, 2),
    ("brightness", 0.5, 2),
    ("aspect_ratio", 0.75, 2),
    ("pixelisation", 0.3, 1),
    ("rotation", 90, 270),
    ("contrast", 0.5, 1.5),
    ("saturation", 0.5, 1.5),
    ("jpeg", 40, 100),
    ("greyscale", 1, 1),
    ("flip", 1, 1),
    ("opacity", 0.2, 1),
    ("stripes", 0.05, 0.35),
    ("pad", 0.01, 0.25),
    ("resize", 64, 512),
    ("crop", 64, 512),
    ("scale", 0.5, 1.5),
    ("sharpen", 1.2, 2),
    ("shuffle", 0, 0.35),
    ("skew", -1, 1),
]
each = pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda augmentation: augmentation.name)


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def values(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def run(name: str, image: Image.Image, strength: float, seed: int = 0) -> Image.Image:
    return BY_NAME[name].apply(image, strength, chance(seed))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def mean_change(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(values(one) - values(other)).mean())


def roughness(image: Image.Image) -> float:
    """Mean difference of neighbours."""
    return float(np.abs(np.diff(values(image), axis=1)).mean())


def test_the_list_and_its_ranges_are_the_published_ones() -> None:
    assert [(entry.name, entry.low, entry.high) for entry in AUGMENTATIONS] == PUBLISHED


@each
@pytest.mark.parametrize("size", [48, 224])
@pytest.mark.parametrize("sides", [(224, 224), (97, 61), (200, 9), (1, 40), (1, 1)])
def test_both_ends_of_the_range_give_an_image(augmentation: Augmentation, size: int, sides: tuple[int, int]) -> None:
    image = pixels(*sides)
    before = image.tobytes()
    for strength in augmentation.limits(size):
        result = augmentation.apply(image, strength, chance())
        assert result.mode == "RGB"
        assert min(result.size) >= 1
        assert max(result.size) <= max(2 * max(sides), math.ceil(augmentation.limits(size)[1]))
    assert image.tobytes() == before


@pytest.mark.parametrize("name", [entry.name for entry in AUGMENTATIONS if entry.identity is not None])
def test_the_identity_strength_changes_no_pixel(name: str) -> None:
    image = pixels(90, 90)
    identity = BY_NAME[name].identity
    assert identity is not None
    assert same(run(name, image, identity), image)


@each
def test_the_ends_of_a_range_differ_unless_there_is_no_strength(augmentation: Augmentation) -> None:
    image = pixels(300, 240)
    low, high = (augmentation.apply(image, end, chance()) for end in (augmentation.low, augmentation.high))
    assert same(low, high) == (augmentation.name in {"greyscale", "flip"})
    assert not (same(low, image) and same(high, image))


def test_blur_is_stronger_with_its_radius() -> None:
    image = pixels(100, 80)
    assert roughness(image) > roughness(run("blur", image, 0.6)) > 2 * roughness(run("blur", image, 2))


def test_brightness_multiplies() -> None:
    image = pixels(40, 40)
    assert np.abs(values(run("brightness", image, 0.5)) - values(image) / 2).max() <= 1
    assert np.array_equal(values(run("brightness", image, 2)), np.minimum(2 * values(image), 255))


@pytest.mark.parametrize("ratio", [0.75, 1.3, 2])
def test_the_aspect_ratio_is_width_to_height_at_the_same_area(ratio: float) -> None:
    width, height = run("aspect_ratio", pixels(300, 200), ratio).size
    assert width / height == pytest.approx(ratio, rel=0.01)
    assert width * height == pytest.approx(300 * 200, rel=0.01)


def test_pixelisation_keeps_the_sides_and_loses_detail() -> None:
    image = pixels(100, 80)
    result = run("pixelisation", image, 0.3)
    assert result.size == image.size
    assert roughness(result) < 0.5 * roughness(image)


@pytest.mark.parametrize(
    ("degrees", "turn"),
    [(90, Image.Transpose.ROTATE_90), (180, Image.Transpose.ROTATE_180), (270, Image.Transpose.ROTATE_270)],
)
@pytest.mark.parametrize("sides", [(50, 50), (51, 32), (20, 77)])
def test_quarter_turns_are_exact(degrees: float, turn: Image.Transpose, sides: tuple[int, int]) -> None:
    image = pixels(*sides)
    assert same(run("rotation", image, degrees), image.transpose(turn))


@pytest.mark.parametrize("sides", [(200, 200), (200, 120), (60, 200), (200, 20)])
def test_a_rotated_image_shows_picture_alone(sides: tuple[int, int]) -> None:
    white = Image.new("RGB", sides, "white")
    for degrees in range(90, 271, 5):
        assert values(run("rotation", white, degrees)).min() == 255


def test_a_square_turned_by_an_eighth_loses_half_its_area() -> None:
    width, height = run("rotation", pixels(200, 200), 135).size
    assert width * height == pytest.approx(200 * 200 / 2, rel=0.02)


def test_rotation_turns_what_pillow_turns() -> None:
    image = run("blur", pixels(160, 120), 3)
    result = run("rotation", image, 117.0)
    turned = image.rotate(117.0, expand=True)
    left, top = (turned.width - result.width) // 2, (turned.height - result.height) // 2
    shifts = ((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1))
    crops = [turned.crop((left + x, top + y, left + x + result.width, top + y + result.height)) for x, y in shifts]
    assert min(mean_change(result, crop) for crop in crops) < 0.25 * mean_change(image, image.rotate(2))


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_contrast_stretches_around_the_mean_grey(factor: float) -> None:
    image = Image.fromarray((values(pixels(60, 60)) // 4 + 100).astype(np.uint8))
    mean = values(image.convert("L")).mean()
    expected = mean + factor * (values(image) - mean)
    assert np.abs(values(run("contrast", image, factor)) - expected).max() <= 1.5


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_saturation_stretches_away_from_grey(factor: float) -> None:
    image = Image.fromarray((values(pixels(60, 60)) // 4 + 100).astype(np.uint8))
    grey = values(image.convert("L"))[..., None]
    assert np.abs(values(run("saturation", image, factor)) - grey - factor * (values(image) - grey)).max() <= 1


def test_jpeg_goes_through_a_file_of_that_quality() -> None:
    image = run("blur", pixels(100, 80), 2)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    assert same(run("jpeg", image, 40.3), Image.open(buffer))
    losses = [mean_change(image, run("jpeg", image, quality)) for quality in (100, 80, 60, 40)]
    assert losses == sorted(losses)
    assert 0 < losses[0] < 0.5 * losses[-1]


def test_greyscale_is_the_luminance_and_leaves_grey_alone() -> None:
    image = pixels(40, 30)
    grey = run("greyscale", image, 1)
    expected = values(image) @ [0.299, 0.587, 0.114]
    assert np.abs(values(grey) - expected[..., None]).max() <= 1
    assert same(run("greyscale", grey, 1), grey)


def test_a_flip_exchanges_left_and_right() -> None:
    image = pixels(41, 30)
    assert np.array_equal(values(run("flip", image, 1)), values(image)[:, ::-1])


@pytest.mark.parametrize("level", [0.2, 0.7])
def test_opacity_lays_the_image_over_white(level: float) -> None:
    image = pixels(40, 30)
    assert np.abs(values(run("opacity", image, level)) - (255 + level * (values(image) - 255))).max() <= 1


@pytest.mark.parametrize("width", [0.05, 0.2, 0.35])
@pytest.mark.parametrize("sides", [(200, 200), (400, 200), (200, 400)])
def test_stripes_cover_their_part_of_the_rows(width: float, sides: tuple[int, int]) -> None:
    striped = values(run("stripes", Image.new("RGB", sides, "black"), width))
    rows = striped[:, 0, 0] == 255
    assert np.array_equal(striped == 255, np.broadcast_to(rows[:, None, None], striped.shape))
    assert rows.mean() == pytest.approx(width, abs=0.02)
    assert rows[sides[1] // 2]
    starts = int(rows[0]) + int((np.diff(rows.astype(int)) == 1).sum())
    assert starts == sides[1] // 100 + 1


@pytest.mark.parametrize("part", [0.01, 0.25])
def test_a_pad_is_a_black_frame(part: float) -> None:
    image = Image.new("RGB", (200, 100), "white")
    padded = values(run("pad", image, part))
    across, down = round(200 * part), round(100 * part)
    assert padded.shape == (100 + 2 * down, 200 + 2 * across, 3)
    assert (padded[down : down + 100, across : across + 200] == 255).all()
    assert padded.sum() == 255 * 3 * 200 * 100


def test_resizing_gives_a_square_and_leaves_one_of_its_side_alone() -> None:
    assert run("resize", pixels(300, 200), 64).size == (64, 64)
    assert run("resize", pixels(300, 200), 511.6).size == (512, 512)
    square = pixels(90, 90)
    assert same(run("resize", square, 90), square)


def test_a_crop_is_a_part_of_the_image() -> None:
    image, square = pixels(120, 100), pixels(90, 90)
    seen = set()
    for seed in range(60):
        crop = run("crop", image, 99, seed)
        places = [(x, y) for x in range(22) for y in range(2) if same(crop, image.crop((x, y, x + 99, y + 99)))]
        assert len(places) == 1
        seen.add(places[0])
    assert {y for _, y in seen} == {0, 1}
    assert len({x for x, _ in seen}) > 15
    assert same(run("crop", square, 90), square)


def test_a_crop_larger_than_the_image_holds_all_of_it_on_black() -> None:
    image = Image.new("RGB", (30, 200), "white")
    lefts = set()
    for seed in range(80):
        crop = values(run("crop", image, 40, seed))
        assert crop.shape == (40, 40, 3)
        columns = np.flatnonzero(crop[0, :, 0])
        assert len(columns) == 30
        assert crop.sum() == 30 * 40 * 3 * 255
        lefts.add(int(columns[0]))
    assert lefts == set(range(11))


@pytest.mark.parametrize("factor", [0.5, 0.83, 1.5])
def test_scaling_multiplies_both_sides(factor: float) -> None:
    assert run("scale", pixels(101, 60), factor).size == (int(101 * factor), int(60 * factor))


def test_sharpening_makes_rougher() -> None:
    image = pixels(100, 80)
    assert roughness(image) < roughness(run("sharpen", image, 1.2)) < roughness(run("sharpen", image, 2))


@pytest.mark.parametrize("part", [0.1, 0.35])
def test_shuffling_moves_its_part_of_the_pixels_and_loses_none(part: float) -> None:
    # Every pixel is unlike any other.
    image = Image.frombytes("RGB", (100, 100), b"".join(i.to_bytes(3, "big") for i in range(10_000)))
    shuffled = run("shuffle", image, part)
    before, after = (values(each).reshape(-1, 3) for each in (image, shuffled))
    assert sorted(map(tuple, after.tolist())) == sorted(map(tuple, before.tolist()))
    assert (before != after).any(axis=1).mean() == pytest.approx(part, rel=0.01)
    assert not same(shuffled, run("shuffle", image, part, seed=1))


@pytest.mark.parametrize("factor", [-1, 1])
def test_skewing_shifts_a_row_by_its_distance_from_the_middle(factor: float) -> None:
    image = pixels(60, 41)
    skewed = values(run("skew", image, factor))
    assert np.array_equal(skewed[20], values(image)[20])
    shift = int(10 * factor)
    moved = np.roll(values(image)[30], -shift, axis=0)
    inside = slice(0, 50) if shift > 0 else slice(10, 60)
    assert np.array_equal(skewed[30][inside], moved[inside])
    assert skewed[30][50:].sum() == 0 if shift > 0 else skewed[30][:10].sum() == 0


def test_none_one_and_two_are_drawn_equally_often() -> None:
    rng = chance(1)
    counts = Counter(len(Augmenter().draw(rng)) for _ in range(6000))
    assert set(counts) == {0, 1, 2}
    assert max(abs(count - 2000) for count in counts.values()) < 5 * math.sqrt(2000)


def test_every_augmentation_is_drawn_equally_often() -> None:
    rng = chance(2)
    counts = Counter(augmentation.name for _ in range(6000) for augmentation, _ in Augmenter().draw(rng))
    expected = 6000 / len(AUGMENTATIONS)
    assert set(counts) == set(BY_NAME)
    assert max(abs(count - expected) for count in counts.values()) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("size", [48, 224])
def test_strengths_cover_their_range_and_keep_to_it(size: int) -> None:
    rng = chance(3)
    strengths: dict[str, list[float]] = {name: [] for name in BY_NAME}
    for _ in range(6000):
        for augmentation, strength in Augmenter(size).draw(rng):
            strengths[augmentation.name].append(strength)
    for name, drawn in strengths.items():
        low, high = BY_NAME[name].limits(size)
        assert low <= min(drawn) <= low + 0.05 * (high - low)
        assert high >= max(drawn) >= high - 0.05 * (high - low)
        assert np.mean(drawn) == pytest.approx((low + high) / 2, abs=0.06 * (high - low))


def test_sides_in_pixels_follow_the_size_of_the_views_and_nothing_else_does() -> None:
    for augmentation in AUGMENTATIONS:
        factor = 0.5 if augmentation.name in {"resize", "crop"} else 1
        assert augmentation.limits(224) == (augmentation.low, augmentation.high)
        assert augmentation.limits(112) == (augmentation.low * factor, augmentation.high * factor)


def test_two_that_are_drawn_differ_and_keep_the_order_of_the_list() -> None:
    rng = chance(4)
    pairs = [drawn for drawn in (Augmenter().draw(rng) for _ in range(6000)) if len(drawn) == 2]
    places = [tuple(AUGMENTATIONS.index(augmentation) for augmentation, _ in pair) for pair in pairs]
    assert all(first < second for first, second in places)
    assert len(set(places)) == math.comb(len(AUGMENTATIONS), 2)


def test_they_are_applied_in_the_order_of_the_list() -> None:
    """Stripes come after brightness and before the pad: white on dark, and black around it."""
    image = Image.new("RGB", (80, 80), (90, 90, 90))
    tried = dict.fromkeys(("brightness", "pad"), 0)
    for seed in range(3000):
        drawn = {augmentation.name: strength for augmentation, strength in Augmenter().draw(chance(seed))}
        if "stripes" not in drawn or len(drawn) < 2 or not drawn.keys() & tried.keys():
            continue
        result = values(Augmenter()(image, chance(seed)))
        assert result[len(result) // 2, 40].tolist() == [255, 255, 255]
        if "pad" in drawn and drawn["pad"] > 0.05:
            assert result[:4].sum() == result[:, :4].sum() == 0
        tried["pad" if "pad" in drawn else "brightness"] += 1
    assert min(tried.values()) >= 2


def test_equal_generators_give_equal_images_and_no_other_chance_is_asked() -> None:
    image = pixels(120, 100)
    np.random.seed(1)
    states = (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tobytes(),
        torch.get_rng_state().tolist(),
    )
    for seed in range(40):
        assert same(Augmenter()(image, chance(seed)), Augmenter()(image, chance(seed)))
    after = (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tobytes(),
        torch.get_rng_state().tolist(),
    )
    assert after == states
