"""How far a trained encoder is drawn back towards the champion's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from code_worker.encoder.architecture import VitConfig
from code_worker.encoder.weights import read_weights, save_weights
from code_worker.training.fitting.network import SHARES, TrainableEncoder, choose_share, interpolate_weights
from code_worker.training.fitting.training_process import main
from tests.training.jobs import MINIATURE, small_job, write_small_job

IMAGES = {"real": 90, "fake": 90, "known": 40, "newcomer": 40}


def confidence(known: list[float], newcomer: list[float]) -> dict[float, dict[str, float]]:
    return {
        share: {"real": 0.9, "fake": (old + new) / 2, "known": old, "newcomer": new}
        for share, old, new in zip(SHARES, known, newcomer, strict=True)
    }


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ([0.90, 0.90, 0.90, 0.90, 0.90], 1.0),
        ([0.90, 0.91, 0.90, 0.885, 0.86], 0.75),
        ([0.90, 0.89, 0.87, 0.85, 0.80], 0.25),
        ([0.90, 0.80, 0.85, 0.70, 0.60], 0.5),
    ],
    ids=["nothing is forgotten", "the end forgets", "all but the start forget", "all forget: the least"],
)
def test_it_goes_as_far_as_nothing_is_forgotten(known: list[float], chosen: float) -> None:
    told = confidence(known, [0.2, 0.5, 0.6, 0.7, 0.8])
    assert choose_share(told, IMAGES, max_forgetting=0.02) == chosen


def test_further_is_not_better_by_itself() -> None:
    told = confidence([0.9] * 5, [0.2, 0.5, 0.8, 0.7, 0.6])
    assert choose_share(told, IMAGES, max_forgetting=0.02) == 0.5


def test_a_handful_of_images_holds_nothing_back() -> None:
    told = confidence([0.90, 0.80, 0.70, 0.60, 0.50], [0.2, 0.5, 0.6, 0.8, 0.9])
    assert choose_share(told, {**IMAGES, "known": 9}, max_forgetting=0.02) == 1.0


def test_reals_count_as_a_group() -> None:
    told = confidence([0.9] * 5, [0.2, 0.5, 0.6, 0.7, 0.8])
    told[1.0]["real"] = told[0.75]["real"] = 0.8
    assert choose_share(told, IMAGES, max_forgetting=0.02) == 0.5


def test_weights_lie_on_the_line_and_its_ends_are_exact() -> None:
    champion, trained = {"a": torch.tensor([0.1, 1.0])}, {"a": torch.tensor([0.3, -1.0])}
    assert torch.equal(interpolate_weights(champion, trained, 0.0)["a"], champion["a"])
    assert torch.equal(interpolate_weights(champion, trained, 1.0)["a"], trained["a"])
    torch.testing.assert_close(interpolate_weights(champion, trained, 0.25)["a"], torch.tensor([0.15, 0.5]))


def test_what_was_trained_is_drawn_back_to_the_champion(tmp_path: Path) -> None:
    champion = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=7, start="cosine").weights("champion")
    save_weights(champion, tmp_path / "champion")
    reports = {}
    for name, allowed in (("free", None), ("held", 0.0)):
        job = small_job(epochs=1, steps_per_epoch=3, max_forgetting=allowed, learning_rate=1e-2)
        job = job.model_copy(update={"initial": str(tmp_path / "champion"), "encoder": {}})
        assert main([str(write_small_job(tmp_path / name, job))]) == 0
        reports[name] = json.loads((tmp_path / name / "result" / "report.json").read_text())
    assert reports["free"]["interpolation"] is None
    told = reports["held"]["interpolation"]
    assert set(told["confidence"]) == {"0.0", "0.25", "0.5", "0.75", "1.0"}
    assert set(told["confidence"]["0.0"]) >= {"real", "fake"}
    trained = read_weights(tmp_path / "free" / "result").state
    for tensor_name, tensor in read_weights(tmp_path / "held" / "result").state.items():
        expected = champion.state[tensor_name].lerp(trained[tensor_name], told["share"])
        torch.testing.assert_close(tensor, expected)
