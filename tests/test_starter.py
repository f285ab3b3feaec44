"""The starter encoder: small enough to ship, said to be a toy, and worth more than an untrained one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import code_worker.demo.starter_release as starter
from code_worker.demo.toy_images import GENERATORS, REAL, crops_of, pictures, training_pictures
from code_worker.encoder.torch_engine import Engine
from code_worker.encoder.weights import EncoderWeights
from code_worker.heads import fit_head
from code_worker.images.decode import decode
from code_worker.plugins import load_plugins
from code_worker.releases.manifest import read_manifest
from code_worker.settings import Settings
from code_worker.training.fitting.network import TrainableEncoder

HOME = Path(starter.__file__).with_name("starter")


@pytest.fixture(scope="module")
def crops() -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    return crops_of(list(training_pictures(60)), Settings().limits)


def test_it_is_small_and_comes_with_recipe_seed_and_curve() -> None:
    assert (HOME / "encoder" / "model.safetensors").stat().st_size <= 3 * 2**20
    report = json.loads((HOME / "report.json").read_text())
    assert report["recipe"]["generators"] == list(GENERATORS)
    assert not set(report["recipe"]["learned_from"]) & set(report["recipe"]["held_out"])
    assert report["settings"]["seed"] == 1
    assert [row["epoch"] for row in report["history"]] == list(range(1, len(report["history"]) + 1))
    best = max(row["metrics"]["linear"] for row in report["history"])
    assert report["linear"] == best


def test_its_release_says_that_it_is_a_toy_and_how_it_crops(
    tmp_path: Path, crops: tuple[NDArray[np.uint8], NDArray[np.int8]]
) -> None:
    starter.build_starter_release(tmp_path / "release", *crops, load_plugins(Settings()))
    manifest, _ = read_manifest(tmp_path / "release")
    assert manifest.toy
    assert manifest.notes.startswith("TOY")
    assert manifest.preprocessing.crop == 48
    assert set(manifest.heads) == {"linear", "knn", "svm"}


def balanced_accuracy(weights: EncoderWeights, crops: tuple[NDArray[np.uint8], NDArray[np.int8]]) -> float:
    engine = Engine(weights, device="cpu")
    head = fit_head(load_plugins(Settings()).head_class("linear")(), engine.embed(crops[0]), crops[1])
    judged = list(pictures(120))
    fake = np.array([picture.source != REAL for picture in judged])
    scores = head.score(engine.embed(np.stack([decode(one.data, Settings().limits)[0] for one in judged])))
    right = (scores >= 0.5) == fake
    return float(right[fake].mean() + right[~fake].mean()) / 2


def test_it_tells_toy_images_apart_as_an_untrained_encoder_does_not(
    crops: tuple[NDArray[np.uint8], NDArray[np.int8]],
) -> None:
    weights = starter.starter_weights()
    untrained = TrainableEncoder.fresh(weights.config, seed=1)
    trained_right = balanced_accuracy(weights, crops)
    assert trained_right > 0.75
    assert trained_right > balanced_accuracy(untrained.weights("untrained"), crops) + 0.1
