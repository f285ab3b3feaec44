"""What a training process is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from code_worker.errors import TrainingError
from code_worker.settings import TrainingSettings
from code_worker.training.fitting.job import (
    TRAIN_FILE,
    VALIDATION_FILE,
    Manner,
    TrainingJob,
    for_device,
    for_encoder,
    read_items,
    read_job,
    write_job,
)
from tests.training.jobs import MINIATURE, items


def test_what_is_left_unset_is_what_the_device_can_do() -> None:
    slow, fast = (for_device(TrainingSettings(), device) for device in ("cpu", "cuda:1"))
    assert slow.steps * slow.records * 50 < fast.steps * fast.records
    asked = for_device(TrainingSettings(epochs=3, steps_per_epoch=7, records=5), "cuda")
    assert (asked.epochs, asked.steps_per_epoch, asked.records, asked.steps) == (3, 7, 5, 21)


def test_what_is_left_unset_follows_the_size_of_the_encoder() -> None:
    for unseen in (False, True):
        assert for_encoder(TrainingSettings(), 224, unseen=unseen) == Manner(2e-4, 1.0, native=False)
    assert for_encoder(TrainingSettings(), 48) == Manner(2e-4, 1.0, native=True)
    assert for_encoder(TrainingSettings(), 48, unseen=True) == Manner(1e-3, 0.5, native=True)
    asked = TrainingSettings(learning_rate=3e-4, keep=0, native=False)
    assert for_encoder(asked, 48) == Manner(3e-4, 0.0, native=False)


def test_a_job_reads_back_as_it_was_written(tmp_path: Path) -> None:
    job = TrainingJob(name="one", encoder=MINIATURE)
    train, holdout = items((0, None, "a", False)), items((1, "sd-1.4", None, True))
    write_job(tmp_path, job, train, holdout)
    assert read_job(tmp_path) == job
    assert read_items(tmp_path / TRAIN_FILE) == train
    assert read_items(tmp_path / VALIDATION_FILE) == holdout
    (tmp_path / TRAIN_FILE).write_text('{"path": "a"}\n')
    with pytest.raises(TrainingError, match=r"train\.jsonl:1: no item"):
        read_items(tmp_path / TRAIN_FILE)
