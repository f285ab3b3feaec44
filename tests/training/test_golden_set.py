"""What is kept out of the learning because the golden set holds it or nearly the same."""

from __future__ import annotations

import hashlib
import random
from functools import partial

from code_worker.data.datasets.examples import FAKE, REAL, Example, pin_of
from code_worker.images.phash import FEATURELESS, perceptual_hash
from code_worker.settings import LimitSettings
from code_worker.store.learning.kept_images import KeptImage, bits, is_near
from code_worker.training.gate.safeguards import GoldenSet
from tests.image_files import encoded, pixels

LIMITS = LimitSettings()


def golden_set(*files: bytes) -> GoldenSet:
    examples = tuple(
        Example(str(number), (REAL, FAKE)[number % 2], partial(bytes, data), sha256=hashlib.sha256(data).hexdigest())
        for number, data in enumerate(files)
    )
    return GoldenSet(examples, pin_of(examples))


def kept(phash: int | None, number: int) -> KeptImage:
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    return KeptImage(sha256, 1, "png", 8, 8, "s3://b/x", bits(phash))


def test_near_duplicates_are_those_that_a_comparison_pair_by_pair_finds() -> None:
    files = [encoded(pixels(48, 48, seed), "PNG") for seed in range(5)]
    own = [perceptual_hash(data, LIMITS) or 0 for data in files]
    draw = random.Random(1)
    around = [one ^ sum(1 << bit for bit in draw.sample(range(64), count)) for one in own for count in range(15)]
    images = [kept(one, number) for number, one in enumerate([*around, FEATURELESS, 2**64 - 1, None])]
    expected = {
        image.sha256
        for image in images
        if image.phash is not None and any(is_near(image.phash, str(bits(one))) for one in own)
    }
    assert len(expected) == 5 * 7
    assert golden_set(*files).near(images, LIMITS) == expected


def test_a_golden_image_that_cannot_be_decoded_is_near_nothing() -> None:
    assert golden_set(b"no image").near([kept(FEATURELESS, 0), kept(None, 1)], LIMITS) == set()
    assert golden_set(b"no image").near([], LIMITS) == set()
