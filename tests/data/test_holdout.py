from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import pytest

from code_worker.data.labelled_images import refuse_holdout
from code_worker.errors import TrainingError
from code_worker.store.learning.label_rules import Split, is_holdout, split_in_share, split_of

SECRET = bytes(range(32))
HELD_OUT = [2, 5, 12, 17, 33, 35, 36, 38, 39]


@dataclass
class Image:
    sha256: str
    split: Split | None = None


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


def test_the_recorded_part_counts_and_not_the_hash() -> None:
    inside, outside = hashes(40)[HELD_OUT[0]], hashes(40)[0]
    refuse_holdout([Image(inside, "train"), Image(inside, "validation")])
    with pytest.raises(TrainingError, match=f"image {outside} belongs to the hold-out"):
        refuse_holdout([Image(outside, "holdout")])


def test_a_fifth_of_all_groups_is_held_out_and_a_tenth_is_for_validation() -> None:
    found = Counter(split_of(f"group {number}", SECRET) for number in range(20_000))
    shares = {split: count / 20_000 for split, count in found.items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "holdout": 0.2}, abs=0.01)


def test_the_split_of_a_group_is_the_same_for_ever() -> None:
    found = [split_of(f"group {number}", SECRET)[0] for number in range(30)]
    assert "".join(found) == "tvttttvvtthttttthttvththttvtth"


def test_a_group_that_is_not_held_out_keeps_its_part_of_the_training_share() -> None:
    for number in range(200):
        if (split := split_of(f"group {number}", SECRET)) != "holdout":
            assert split_in_share(f"group {number}", SECRET) == split


def test_another_secret_splits_otherwise() -> None:
    """Who knows how one installation splits guesses another one no better than chance."""
    groups = [f"group {number}" for number in range(5000)]
    held = {group for group in groups if split_of(group, SECRET) == "holdout"}
    both = sum(split_of(group, bytes(32)) == "holdout" for group in held)
    assert both / len(held) == pytest.approx(0.2, abs=0.05)


def test_a_secret_that_could_be_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        split_of("group", b"short")
