from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest

from code_worker.data.holdout import is_holdout, refuse_holdout
from code_worker.errors import TrainingError

HELD_OUT = [2, 5, 12, 17, 33, 35, 36, 38, 39]


@dataclass
class Image:
    sha256: str | None


def hashes(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def test_a_fifth_of_all_images_is_held_out() -> None:
    share = sum(map(is_holdout, hashes(20_000))) / 20_000
    assert share == pytest.approx(0.2, abs=0.01)


def test_membership_is_the_same_for_ever() -> None:
    assert [number for number, sha256 in enumerate(hashes(40)) if is_holdout(sha256)] == HELD_OUT


def test_an_image_of_the_holdout_is_refused_by_name() -> None:
    images = [Image(sha256) for sha256 in hashes(40)]
    learned = [image for number, image in enumerate(images) if number not in HELD_OUT]
    refuse_holdout(learned)
    with pytest.raises(TrainingError, match=f"image {images[HELD_OUT[0]].sha256} belongs to the hold-out"):
        refuse_holdout([*learned, images[HELD_OUT[0]]])


def test_an_image_whose_hash_nobody_knows_is_refused() -> None:
    with pytest.raises(TrainingError, match="without a content hash"):
        refuse_holdout([Image(None)])
