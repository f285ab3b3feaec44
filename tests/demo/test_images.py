from __future__ import annotations

import numpy as np
import pytest

from code_worker.demo.toy_images import (
    GENERATORS,
    NEWCOMER,
    NEWCOMERS,
    REAL,
    crops_of,
    newcomer_pictures,
    pictures,
    training_pictures,
)
from code_worker.settings import Settings


def test_every_other_picture_is_real_and_the_known_generators_take_turns() -> None:
    assert [picture.source for picture in pictures(10)] == [
        one for name in (*GENERATORS, "toy-nearest") for one in (REAL, name)
    ]


def test_of_the_newcomers_pictures_every_other_one_is_real() -> None:
    assert [picture.source for picture in newcomer_pictures(4)] == [REAL, NEWCOMER, REAL, NEWCOMER]


def test_nothing_is_judged_that_was_learned_from_and_no_two_files_have_one_name() -> None:
    every = [*pictures(12), *newcomer_pictures(12), *training_pictures(6)]
    assert len({picture.sha256 for picture in every}) == len(every)
    assert len({picture.name for picture in every}) == len(every)


def test_what_is_learned_from_comes_in_pairs_of_one_cut() -> None:
    learned = list(training_pictures(4))
    assert [picture.source for picture in learned] == [one for name in GENERATORS for one in (REAL, name)]
    crops, labels = crops_of(learned, Settings().limits)
    assert labels.tolist() == [0, 1] * 4
    blurred = crops.reshape(8, 8, 28, 8, 28, 3).mean(axis=(2, 4))
    assert np.abs(blurred[0::2] - blurred[1::2]).mean() < 4
    assert np.abs(blurred[0] - blurred[2]).mean() > 10


@pytest.mark.parametrize("name", [*GENERATORS, *NEWCOMERS])
def test_a_toy_generator_changes_a_picture_and_keeps_its_size_whatever_that_is(name: str) -> None:
    simulate = {**GENERATORS, **NEWCOMERS}[name]
    for height, width in ((233, 301), (240, 232)):
        pixels = np.random.default_rng(0).integers(60, 200, (height, width, 3), dtype=np.uint8)
        made = simulate(pixels, np.random.default_rng(1))
        assert (made.shape, made.dtype) == (pixels.shape, np.uint8)
        assert (made != pixels).mean() > 0.3


def test_the_newcomers_trace_is_faint_dots_over_the_whole_picture() -> None:
    grey = np.full((64, 66, 3), 128, np.uint8)
    made = NEWCOMERS["toy-dotted"](grey, np.random.default_rng(5)).astype(int)
    assert (made == np.tile(made[:2, :2], (32, 33, 1))).all()
    assert (made[0, 0] == made[1, 1]).all()
    assert (made[0, 0] - 128 == 128 - made[0, 1]).all()
    assert 4 <= abs(made[0, 0, 0] - 128) <= 8
