"""The trainer: the same bits after every interruption, the same gradient in parts, a clear word on every failure."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from code_worker.encoder.architecture import VitConfig
from code_worker.encoder.torch_engine import Engine
from code_worker.encoder.weights import read_weights
from code_worker.errors import DivergedError, TrainingError
from code_worker.plugins import load_plugins
from code_worker.settings import Settings, TrainingSettings
from code_worker.training.fitting.batches import RecordSampler, generator_of_step
from code_worker.training.fitting.job import TRAIN_FILE, VALIDATION_FILE, for_device, read_items, read_job, write_job
from code_worker.training.fitting.network import (
    WARMUP_FROM,
    TrainableEncoder,
    World,
    cosine_projection,
    learning_rate,
)
from code_worker.training.fitting.objective import DivergenceWatch, Stepper, chance_loss
from code_worker.training.fitting.trainer import Trainer, write_checkpoint
from code_worker.training.fitting.training_process import _encoder, main
from code_worker.types import EMBEDDING_TOLERANCE
from tests import kernels
from tests.faults.rows import Seen, row
from tests.training.jobs import MINIATURE, items, picture, small_job, write_items, write_small_job

VIEWS = 8


@pytest.fixture(autouse=True)
def number_of_threads() -> None:
    """Bits are compared: the number of threads must not change between two runs of a test."""
    torch.set_num_threads(kernels.threads())


def trainer_for(directory: Path) -> Trainer:
    job = read_job(directory)
    encoder = TrainableEncoder.fresh(VitConfig(**job.encoder), seed=job.settings.seed, start=job.start)
    train, validation = read_items(directory / TRAIN_FILE), read_items(directory / VALIDATION_FILE)
    return Trainer(directory, job, train, validation, encoder, world=World(), plugins=load_plugins(Settings()))


def metrics(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def result_bytes(directory: Path) -> bytes:
    return (directory / "result" / "encoder" / "model.safetensors").read_bytes()


def test_a_job_ends_with_an_encoder_a_report_and_curves(tmp_path: Path) -> None:
    directory = write_small_job(tmp_path / "job", small_job().model_copy(update={"picture_every": 2}))
    assert main([str(directory)]) == 0
    weights = read_weights(directory / "result")
    assert Engine(weights, device="cpu").embed(np.zeros((1, 224, 224, 3), np.uint8)).shape == (1, 192)
    report = json.loads((directory / "result" / "report.json").read_text())
    assert report["steps"] == 8
    assert not report["stopped_early"]
    epochs = metrics(directory)
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, 4), (2, 8)]
    measured = epochs[-1]["metrics"]
    assert isinstance(measured, dict)
    for head in ("linear", "knn", "svm"):
        for kind in ("clean", "transformed"):
            assert {f"{head}/{kind}/{group}" for group in ("mean", "real", "fake", "doubled")} <= measured.keys()
    progress = json.loads((directory / "progress.json").read_text())
    assert (progress["step"], progress["steps"]) == (8, 8) or progress["stage"] == "training"
    assert (directory / "pictures" / "epoch-0002.png").stat().st_size > 1000
    assert list((directory / "tensorboard").iterdir())


def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_bits(tmp_path: Path) -> None:
    job = small_job(epochs=2, steps_per_epoch=3, ema_decay=0.9)
    whole = write_small_job(tmp_path / "whole", job)
    assert trainer_for(whole).run()
    for stop_after in (1, 3, 4):
        broken = tmp_path / f"broken-{stop_after}"
        shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("checkpoints", "result", "metrics.jsonl"))
        first = trainer_for(broken)
        advance = first._advance

        def and_stop(batch: torch.Tensor, first: Trainer = first, advance=advance, at: int = stop_after) -> None:  # type: ignore[no-untyped-def]
            advance(batch)
            if first.step == at:
                first.stop()

        first._advance = and_stop  # type: ignore[method-assign]
        assert not first.run()
        assert first.step == stop_after
        second = trainer_for(broken)
        assert second.run()
        assert result_bytes(broken) == result_bytes(whole)
        assert metrics(broken) == metrics(whole)


def test_a_resumed_run_measures_what_lies_after_its_checkpoint_once(tmp_path: Path) -> None:
    directory = write_small_job(tmp_path / "job")
    assert trainer_for(directory).run()
    expected = metrics(directory)
    # As if the process had died after measuring the last epoch and before its checkpoint.
    newest = max((directory / "checkpoints").iterdir())
    newest.unlink()
    shutil.rmtree(directory / "result")
    assert trainer_for(directory).run()
    assert metrics(directory) == expected


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    directory = write_small_job(tmp_path / "job")
    assert trainer_for(directory).run()
    expected = result_bytes(directory)
    newest = max((directory / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    shutil.rmtree(directory / "result")
    assert trainer_for(directory).run()
    assert result_bytes(directory) == expected


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_checkpoint(tmp_path, 1, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainingError, match=r"step 2: the checkpoint cannot be written .* No space left"):
        write_checkpoint(tmp_path, 2, {"step": 2})
    assert list(tmp_path.iterdir()) == [before]


@row("F34", injection="a checkpoint outgrows RLIMIT_FSIZE", expected="a typed error, the checkpoint before intact")
def test_a_disk_that_fills_up_under_a_checkpoint_leaves_the_one_before(tmp_path: Path, seen: Seen) -> None:
    before = write_checkpoint(tmp_path, 1, {"step": 1})
    content = before.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"step 2: the checkpoint cannot be written"):
            write_checkpoint(tmp_path, 2, {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [before]
    assert before.read_bytes() == content
    seen(checkpoints_left=1, half_written=0)


def batch_of(records: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (records, VIEWS, 32, 32, 3), dtype=np.uint8))


def gradients(accumulate: int, batch: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    # In float64, where an algebraic identity holds to a few units in the fifteenth digit.
    encoder = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=0).double()
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.0)
    loss = Stepper(encoder, optimiser, World(), seed=0, accumulate=accumulate)(batch, 0)
    return loss, [p.grad for p in encoder.parameters() if p.grad is not None]


@pytest.mark.numeric
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_records_in_parts_give_the_gradient_of_all_at_once(parts: int) -> None:
    batch = batch_of(6)
    loss, whole = gradients(1, batch)
    loss_in_parts, in_parts = gradients(parts, batch)
    assert loss_in_parts == pytest.approx(loss, rel=1e-9)
    for one, other in zip(whole, in_parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(one.abs().max()))


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    directory = write_small_job(tmp_path / "job")
    trainer = trainer_for(directory)
    with torch.no_grad():
        trainer._encoder.vit.norm.weight[0] = float("nan")
    with pytest.raises(DivergedError, match="diverged at step 0: the loss is nan") as caught:
        trainer.run()
    assert caught.value.step == 0


def test_the_process_records_divergence_with_its_step(tmp_path: Path) -> None:
    directory = write_small_job(
        tmp_path / "job", small_job(learning_rate=1000.0, weight_decay=1000.0, steps_per_epoch=20, warmup_epochs=0)
    )
    assert main([str(directory)]) == 3
    failure = json.loads((directory / "failure.json").read_text())
    assert "diverged at step" in failure["reason"]
    assert failure["step"] > 0
    assert not (directory / "result").exists()


def test_a_loss_above_chance_for_long_is_divergence() -> None:
    watch = DivergenceWatch(chance_loss(8))
    for step in range(200):
        watch.see(chance_loss(8), step)
    complained = _first_complaint(watch, 1.5 * chance_loss(8))
    assert complained is not None
    assert complained > 300


def test_a_loss_a_little_above_chance_is_no_divergence() -> None:
    assert _first_complaint(DivergenceWatch(chance_loss(8)), 1.1 * chance_loss(8)) is None


def _first_complaint(watch: DivergenceWatch, loss: float) -> int | None:
    for step in range(200, 600):
        try:
            watch.see(loss, step)
        except DivergedError as error:
            return error.step
    return None


@pytest.mark.parametrize(("lacking", "says"), [(0, "0 real and 12 generated"), (1, "12 real and 0 generated")])
def test_images_of_one_class_are_refused(tmp_path: Path, lacking: int, says: str) -> None:
    train = [item for item in write_items(tmp_path / "a", 12) if item.label != lacking]
    write_job(tmp_path / "job", small_job(), train, write_items(tmp_path / "b", 8, seed=1))
    assert main([str(tmp_path / "job")]) == 3
    assert says in json.loads((tmp_path / "job" / "failure.json").read_text())["reason"]


@pytest.mark.parametrize("part", ["to learn from", "to choose by"])
def test_the_process_refuses_the_holdout_in_either_part(tmp_path: Path, part: str) -> None:
    train, validation = write_items(tmp_path / "a", 12), write_items(tmp_path / "b", 8, seed=1)
    (held_out, *_) = write_items(tmp_path / "c", 8, seed=2, held_out=True)
    (train if part == "to learn from" else validation).append(held_out)
    write_job(tmp_path / "job", small_job(), train, validation)
    assert main([str(tmp_path / "job")]) == 3
    reason = json.loads((tmp_path / "job" / "failure.json").read_text())["reason"]
    assert held_out.sha256 in reason
    assert "hold-out" in reason


def test_an_image_on_both_sides_is_refused_whatever_the_split(tmp_path: Path) -> None:
    train = write_items(tmp_path / "a", 12)
    validation = write_items(tmp_path / "b", 8, seed=1)
    job = small_job()
    write_job(tmp_path / "job", job, [*train, validation[0]], validation)
    assert main([str(tmp_path / "job")]) == 3
    assert "learned from and to validate" in json.loads((tmp_path / "job" / "failure.json").read_text())["reason"]


def test_broken_images_are_left_out_and_listed(tmp_path: Path) -> None:
    train = write_items(tmp_path / "a", 12)
    Path(train[0].path).write_bytes(b"no image")
    Path(train[1].path).unlink()
    write_job(tmp_path / "job", small_job(), train, write_items(tmp_path / "b", 8, seed=1))
    assert main([str(tmp_path / "job")]) == 0
    broken = json.loads((tmp_path / "job" / "result" / "report.json").read_text())["broken"]
    assert {entry["path"] for entry in broken} == {train[0].path, train[1].path}
    assert all(entry["reason"] for entry in broken)


def test_images_that_are_all_gone_are_said_to_be(tmp_path: Path) -> None:
    train = write_items(tmp_path / "a", 12)
    shutil.rmtree(tmp_path / "a")
    write_job(tmp_path / "job", small_job(), train, write_items(tmp_path / "b", 8, seed=1))
    assert main([str(tmp_path / "job")]) == 3
    assert "can be decoded" in json.loads((tmp_path / "job" / "failure.json").read_text())["reason"]


@pytest.mark.parametrize("content", [None, "{", '{"format": 2}'])
def test_a_directory_without_a_job_is_wrong_use(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "job.json").write_text(content)
    assert main([str(tmp_path)]) == 2


def test_patience_ends_a_run_that_does_not_improve(tmp_path: Path) -> None:
    job = small_job(epochs=9, steps_per_epoch=1, patience=2, learning_rate=1e-12, warmup_epochs=0)
    directory = write_small_job(tmp_path / "job", job)
    assert trainer_for(directory).run()
    report = json.loads((directory / "result" / "report.json").read_text())
    assert report["stopped_early"]
    assert report["steps"] == report["best_epoch"] + 2


def test_64_records_without_augmentation_are_learned_by_heart() -> None:
    rng = np.random.default_rng(0)
    images = {fake: np.stack([picture(rng, fake=fake)[:32, :32] for _ in range(64)]) for fake in (False, True)}
    batch = torch.from_numpy(np.stack([images[False]] * 4 + [images[True]] * 4, axis=1))
    encoder = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=0, start="cosine")
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    stepper = Stepper(encoder, optimiser, World(), seed=0)
    losses = [stepper(batch, step) for step in range(40)]
    assert losses[-1] < losses[0] / 2
    with torch.inference_mode():
        rows = encoder(batch[:, [0, 4]].flatten(0, 1)).numpy()
    labels = np.tile(np.array([0, 1], np.int8), 64)
    embeddings = np.pad(rows, ((0, 0), (0, 192 - rows.shape[1])))
    head = load_plugins(Settings()).head_class("linear")().fit(embeddings, labels)
    assert ((head.score(embeddings) >= 0.5) == labels).all()


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    scale = for_device(TrainingSettings(epochs=10, steps_per_epoch=10), "cpu")
    rates = [learning_rate(step, 1e-3, warmup_epochs=2, scale=scale) for step in range(scale.steps)]
    assert len(rates) == 100
    assert rates[0] == WARMUP_FROM
    assert rates[20] == max(rates) == 1e-3
    assert all(one < other for one, other in pairwise(rates[:21]))
    assert all(one > other for one, other in pairwise(rates[20:]))
    assert rates[60] == pytest.approx(5e-4)
    assert rates[-1] < 1e-6


def test_siblings_come_together_and_generators_equally_often() -> None:
    many = [(0, None, f"r{n}", False) for n in range(30)] + [(1, "common", f"r{n}", False) for n in range(29)]
    sampler = RecordSampler(items(*many, (1, "rare", "r29", False)), new_share=0.5)
    drawn = sampler.draw(generator_of_step(0, 0), 2000)
    assert all(fake == real + 30 for real, fake in drawn)
    assert sum(fake == 59 for _, fake in drawn) / 2000 == pytest.approx(0.5, abs=0.05)


def test_each_real_of_a_group_comes_with_its_generated_image() -> None:
    kinds = [(0, None, "post", False)] * 3 + [(0, None, None, False), (0, None, "other", False)]
    sampler = RecordSampler(items(*kinds, (1, "g", "post", False)), new_share=0.5)
    drawn = sampler.draw(generator_of_step(0, 0), 300)
    assert {real for real, _ in drawn} == {0, 1, 2}


def test_new_images_get_their_share() -> None:
    kinds = [(0, None, None, False)] * 50 + [(0, None, None, True)] * 2 + [(1, "old", None, False)] * 50
    sampler = RecordSampler(items(*kinds, (1, "new", None, True)), new_share=0.6)
    drawn = sampler.draw(generator_of_step(0, 0), 3000)
    assert sum(fake == 102 for _, fake in drawn) / 3000 == pytest.approx(0.6, abs=0.04)
    assert sum(50 <= real < 52 for real, _ in drawn) / 3000 == pytest.approx(0.3, abs=0.04)


def test_a_step_draws_the_same_in_every_run_and_another_step_does_not() -> None:
    sampler = RecordSampler(items(*[(n % 2, "g" if n % 2 else None, None, False) for n in range(40)]), new_share=0.5)
    assert sampler.draw(generator_of_step(3, 5), 20) == sampler.draw(generator_of_step(3, 5), 20)
    others = [generator_of_step(3, 6), generator_of_step(4, 5), generator_of_step(3, 5, rank=1)]
    assert all(sampler.draw(rng, 20) != sampler.draw(generator_of_step(3, 5), 20) for rng in others)


def test_the_cosine_start_is_orthogonal_and_bounded() -> None:
    projection = F.normalize(cosine_projection(192, 8).flatten(1).double(), dim=1)
    gram = (projection @ projection.T).fill_diagonal_(0).abs()
    assert gram[:64, :64].max() < 1e-6
    # The two colour differences of one wave lean on brightness and on one another; nothing else does.
    assert int((gram > 1e-6).sum(dim=1).max()) <= 2
    with pytest.raises(ValueError, match="has 192 numbers, fewer than 193"):
        cosine_projection(193, 8)


def test_a_warm_start_lies_between_fresh_weights_and_the_champions() -> None:
    fresh = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=0).weights("fresh").state
    champion = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=5).weights("champion")
    for share in (0.0, 0.3, 1.0):
        mixed = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=0).mixed_with(champion, share).weights("mixed")
        for name, tensor in mixed.state.items():
            torch.testing.assert_close(tensor, (1 - share) * fresh[name] + share * champion.state[name])
    assert all(torch.equal(mixed.state[name], champion.state[name]) for name in champion.state)


@pytest.mark.parametrize(("keep", "same"), [(1.0, True), (0.5, False), (None, True)])
def test_a_retrain_begins_with_as_much_of_the_champion_as_asked_for(keep: float | None, same: bool) -> None:
    champion = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=5).weights("champion")
    begun = _encoder(small_job(keep=keep), champion).weights("begun").state
    assert all(torch.equal(begun[name], champion.state[name]) for name in begun) is same


@pytest.mark.numeric
def test_the_network_gives_the_embeddings_that_workers_compute() -> None:
    encoder = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=3, start="cosine").eval()
    crops = np.random.default_rng(3).integers(0, 256, (4, 224, 224, 3), dtype=np.uint8)
    expected = Engine(encoder.weights("a test"), device="cpu").embed(crops)
    with torch.inference_mode():
        found = encoder(torch.from_numpy(crops[:, 96:128, 96:128].copy())).numpy()
    np.testing.assert_allclose(found, expected[:, :48], atol=EMBEDDING_TOLERANCE, rtol=0)


def test_fresh_weights_are_drawn_for_the_encoder_of_a_release(tmp_path: Path) -> None:
    # A run writes the whole configuration of its champion, whose tuples JSON knows as lists.
    job = small_job(epochs=1, steps_per_epoch=1).model_copy(update={"encoder": asdict(VitConfig(**MINIATURE))})
    directory = write_small_job(tmp_path / "job", job)
    assert main([str(directory)]) == 0
    assert read_weights(directory / "result").config == VitConfig(**MINIATURE)
