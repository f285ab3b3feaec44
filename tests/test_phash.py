"""The perceptual hash: the same for equal pixels, nearly so for copies, and another one for another photograph."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from bench.photographs import HELD_OUT, LEARNED_FROM, Album
from code_worker.images.decode import decode_whole
from code_worker.images.phash import FEATURELESS, perceptual_hash
from code_worker.settings import LimitSettings
from code_worker.store.learning.kept_images import NEAR_BITS, bits, is_near
from tests.drawings import PLAIN, symmetric_blobs, transparent_logo
from tests.image_files import encoded, pixels, png_chunk

LIMITS = LimitSettings()
NOT_PHOTOGRAPHS = frozenset({"skimage/data/brick.png", "skimage/data/grass.png", "skimage/data/gravel.png"})
"""Textures, of which a piece looks like another one."""


def hash_of(image: Image.Image, kind: str = "PNG", **options: object) -> int:
    found = perceptual_hash(encoded(image, kind, **options), LIMITS)
    assert found is not None
    return found


def distance(first: int, second: int) -> int:
    return (first ^ second).bit_count()


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    album = Album((*LEARNED_FROM, *HELD_OUT))
    return {name: Image.fromarray(pixels) for name, pixels in album.photographs.items()}


@pytest.fixture(scope="module")
def hashes(photographs: dict[str, Image.Image]) -> dict[str, int]:
    return {name: hash_of(image) for name, image in photographs.items()}


@pytest.mark.parametrize("image", [pixels(32, 32, seed=3), symmetric_blobs(3).resize((32, 32))])
def test_the_hash_is_the_naive_cosine_transform_against_the_median(image: Image.Image) -> None:
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    lowest = []
    for v in range(8):
        for u in range(8):
            waves = [
                [np.cos(np.pi * v * (2 * y + 1) / 64) * np.cos(np.pi * u * (2 * x + 1) / 64) for x in range(32)]
                for y in range(32)
            ]
            lowest.append(float((grey * np.array(waves)).sum()))
    least = max(map(abs, lowest[1:])) / 200
    counted = [one if abs(one) >= least else 0.0 for one in lowest[1:]]
    said = "1" + "".join("1" if one > np.median(counted) else "0" for one in counted)
    assert hash_of(image) == int(said, 2)


def test_bytes_beside_the_pixels_change_nothing() -> None:
    image = pixels(300, 200)
    jpeg, whole = encoded(image, "JPEG", quality=90), encoded(image, "PNG")
    assert len({perceptual_hash(jpeg + b"x" * count, LIMITS) for count in range(50)}) == 1
    noted = whole[:33] + png_chunk(b"tEXt", b"Comment\0holdout?") + whole[33:]
    assert perceptual_hash(noted, LIMITS) == perceptual_hash(whole, LIMITS)


@pytest.mark.parametrize(("scale", "quality"), [(0.5, 60), (0.73, 95), (1.0, 30), (2.0, 75)])
def test_a_copy_reencoded_or_resized_is_near(
    photographs: dict[str, Image.Image], hashes: dict[str, int], scale: float, quality: int
) -> None:
    for name, image in photographs.items():
        size = (round(image.width * scale), round(image.height * scale))
        copy = image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC)
        far = distance(hashes[name], hash_of(copy, "JPEG", quality=quality))
        assert far <= NEAR_BITS, f"{name} differs from its copy in {far} bits"


@pytest.mark.parametrize("kind", PLAIN)
def test_a_copy_of_what_is_no_photograph_is_near_as_well(kind: str) -> None:
    for seed in range(12):
        image = PLAIN[kind](seed)
        first, half = hash_of(image), image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        copies = [hash_of(image, "JPEG", quality=quality) for quality in (95, 75, 30)]
        copies += [hash_of(half), hash_of(half, "JPEG", quality=60), hash_of(image, "WEBP", quality=50)]
        far = [distance(first, copy) for copy in copies]
        assert max(far) <= NEAR_BITS, f"{kind} {seed} differs from its copies in {far} bits"


@pytest.mark.parametrize("kind", ["blobs", "ornament", "text"])
def test_different_symmetric_or_sparse_pictures_are_far_from_each_other(kind: str) -> None:
    hashes = [hash_of(PLAIN[kind](seed)) for seed in range(12)]
    assert min(distance(*pair) for pair in combinations(hashes, 2)) > NEAR_BITS


@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_a_logo_of_one_colour_is_told_by_what_is_transparent(colour: str) -> None:
    logos = [transparent_logo(seed, colour) for seed in range(12)]
    hashes = [hash_of(logo) for logo in logos]
    assert min(distance(*pair) for pair in combinations(hashes, 2)) > NEAR_BITS
    for logo, first in zip(logos, hashes, strict=True):
        half = logo.resize((logo.width // 2, logo.height // 2), Image.Resampling.LANCZOS)
        seen = Image.new("RGB", logo.size, "white" if colour == "black" else "black")
        seen.paste(logo, mask=logo)
        copies = [hash_of(logo, "WEBP", quality=50), hash_of(half), hash_of(seen, "JPEG", quality=75)]
        assert max(distance(first, copy) for copy in copies) <= NEAR_BITS


def test_nobody_chooses_a_hash_by_what_is_transparent_in_a_picture() -> None:
    """Alpha is not judged: were it hashed, one image could be given on both sides of the hold-out."""
    image = pixels(120, 120)
    veiled = []
    for seed in range(5):
        veiled.append(image.copy())
        veiled[-1].putalpha(symmetric_blobs(seed).resize(image.size))
    assert {hash_of(one) for one in veiled} == {hash_of(image)}


def test_pieces_of_different_photographs_are_far_from_each_other(photographs: dict[str, Image.Image]) -> None:
    """The rate of false joins: of 12,000 pairs none is near, so under 3 in 12,000 at 95 % confidence."""
    pieces = [
        (name, hash_of(image.crop((left, top, left + 160, top + 160))))
        for name, image in photographs.items()
        if name not in NOT_PHOTOGRAPHS
        for top in range(0, image.height - 159, 160)
        for left in range(0, image.width - 159, 160)
    ]
    pairs = [(one, other) for (first, one), (second, other) in combinations(pieces, 2) if first != second]
    assert len(pairs) > 12_000
    assert not [pair for pair in pairs if distance(*pair) <= NEAR_BITS]
    assert np.mean([distance(*pair) for pair in pairs]) == pytest.approx(31.5, abs=1)


def test_images_without_structure_are_all_alike() -> None:
    colours = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white", "red")]
    colours.append(Image.new("RGBA", (64, 64), (9, 9, 9, 128)))
    assert {hash_of(image) for image in colours} == {FEATURELESS}
    assert not is_near(str(bits(hash_of(pixels(64, 64)))), str(bits(FEATURELESS)))


def test_what_cannot_be_decoded_has_no_hash() -> None:
    whole = encoded(pixels(64, 64), "JPEG")
    assert perceptual_hash(whole[: len(whole) // 2], LIMITS) is None
    assert perceptual_hash(b"no image", LIMITS) is None
    assert bits(None) is None


def test_a_large_jpeg_is_decoded_small() -> None:
    """The hash of 12 megapixels must not cost what all of them do; it is that of the whole image all the same."""
    large = pixels(400, 300).resize((4000, 3000), Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=90)
    assert distance(perceptual_hash(data, LIMITS) or 0, hash_of(large)) <= NEAR_BITS
    assert decode_whole(data, LIMITS, least_side=256).size == (500, 375)
