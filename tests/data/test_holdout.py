from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from code_worker.data.labelled_images import refuse_holdout
from code_worker.errors import TrainingError
from code_worker.store.learning.label_rules import Split, split_of

SECRET = bytes(range(32))


@dataclass
class Image:
    sha256: str
    split: Split


def test_an_image_of_the_holdout_is_refused_by_name() -> None:
    learned = [Image("a" * 64, "train"), Image("b" * 64, "validation")]
    refuse_holdout(learned)
    with pytest.raises(TrainingError, match=f"image {'c' * 64} belongs to the hold-out"):
        refuse_holdout([*learned, Image("c" * 64, "holdout")])


def test_a_fifth_of_all_groups_is_held_out_and_a_tenth_is_for_validation() -> None:
    found = Counter(split_of(f"group {number}", SECRET) for number in range(20_000))
    shares = {split: count / 20_000 for split, count in found.items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "holdout": 0.2}, abs=0.01)


def test_the_split_of_a_group_is_the_same_for_ever() -> None:
    found = [split_of(f"group {number}", SECRET)[0] for number in range(30)]
    assert "".join(found) == "tvttttvvtthttttthttvththttvtth"


def test_another_secret_splits_otherwise() -> None:
    """Who knows how one installation splits guesses another one no better than chance."""
    groups = [f"group {number}" for number in range(5000)]
    held = {group for group in groups if split_of(group, SECRET) == "holdout"}
    both = sum(split_of(group, bytes(32)) == "holdout" for group in held)
    assert both / len(held) == pytest.approx(0.2, abs=0.05)


def test_a_secret_that_could_be_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        split_of("group", b"short")
