"""The training process: `python -m code_worker.training.fitting.training_process JOBDIR`, alone or under torchrun."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from code_worker.data.labelled_images import refuse_holdout
from code_worker.encoder.architecture import VitConfig
from code_worker.encoder.torch_engine import resolve_device
from code_worker.encoder.weights import EncoderWeights, read_weights
from code_worker.errors import CodeWorkerError, ConfigurationError, DivergedError, TrainingError
from code_worker.logs import configure_logging, get_logger
from code_worker.plugins import load_plugins
from code_worker.settings import load_settings
from code_worker.system.machine import usable_cores
from code_worker.training.fitting.job import (
    FAILED_STATUS,
    TRAIN_FILE,
    VALIDATION_FILE,
    TrainingJob,
    for_encoder,
    read_items,
    read_job,
)
from code_worker.training.fitting.measure import TrainingRecord
from code_worker.training.fitting.network import TrainableEncoder, World, join_processes
from code_worker.training.fitting.trainer import Trainer
from code_worker.types import IMAGE_SIZE

log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; see the module for exit statuses."""
    parser = argparse.ArgumentParser(prog="code_worker.training.fitting.training_process")
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args(argv).directory
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    try:
        job = read_job(directory)
    except TrainingError as error:
        log.error("no_training_job", error=str(error))
        return 2
    (directory / "failure.json").unlink(missing_ok=True)
    try:
        _train(directory, job)
    except CodeWorkerError as error:
        _fail(directory, str(error), error)
    except (OSError, torch.OutOfMemoryError) as error:
        _fail(directory, f"{type(error).__name__}: {error}", error)
    else:
        return 0
    return FAILED_STATUS


def _train(directory: Path, job: TrainingJob) -> None:
    train, validation = read_items(directory / TRAIN_FILE), read_items(directory / VALIDATION_FILE)
    refuse_holdout([*train, *validation])
    if both := {item.sha256 for item in train} & {item.sha256 for item in validation}:
        raise TrainingError(f"{len(both)} images are to be learned from and to validate, {min(both)[:16]}… for one")
    device = resolve_device(job.device)
    with join_processes(device) as world:
        champion = None if job.initial is None else read_weights(Path(job.initial))
        encoder = _encoder(job, champion).to(_own_device(device, world))
        _share_cores(device, world)
        plugins = load_plugins(load_settings())
        trainer = Trainer(directory, job, train, validation, encoder, world=world, plugins=plugins, champion=champion)
        signal.signal(signal.SIGTERM, lambda *_: trainer.stop())
        if not trainer.run():
            log.info("training_stopped", step=trainer.step)


def _encoder(job: TrainingJob, champion: EncoderWeights | None) -> TrainableEncoder:
    config = _config(job) if champion is None else champion.config
    small = config.image_size < IMAGE_SIZE
    keep = 0.0 if champion is None else for_encoder(job.settings, config.image_size, unseen=job.unseen).keep
    if champion is not None and keep == 1:
        return TrainableEncoder.of(champion)
    fresh = TrainableEncoder.fresh(config, seed=job.settings.seed, start=job.start or ("cosine" if small else "timm"))
    return fresh if champion is None else fresh.mixed_with(champion, keep)


def _config(job: TrainingJob) -> VitConfig:
    # JSON knows no tuples.
    described: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in job.encoder.items()}
    try:
        return VitConfig(**described)
    except TypeError as error:
        raise ConfigurationError(f"encoder of the training job: {error}") from error


def _own_device(device: str, world: World) -> str:
    if device == "cuda" and world.size > 1:
        torch.cuda.set_device(world.local_rank)
        return f"cuda:{world.local_rank}"
    return device


def _share_cores(device: str, world: World) -> None:
    """Processes of one machine share its cores; torchrun alone would give each one thread on any machine."""
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ and world.size == 1:
        cores = usable_cores()
        torch.set_num_threads(max(1, cores // world.size))


def _fail(directory: Path, reason: str, error: BaseException) -> None:
    step = error.step if isinstance(error, DivergedError) else None
    log.error("training_failed", reason=reason, step=step)
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            TrainingRecord(directory).failure(reason, step)
        except OSError as full:
            log.error("failure_not_written", error=str(full))


if __name__ == "__main__":
    sys.exit(main())
