"""The input of a training process: a directory with the job, the images to learn from, those that validate it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from code_worker.errors import TrainingError
from code_worker.settings import LimitSettings, TrainingSettings
from code_worker.store.learning.label_rules import Split
from code_worker.system.files import whole_file
from code_worker.types import IMAGE_SIZE

JOB_FILE: Final = "job.json"
TRAIN_FILE: Final = "train.jsonl"
VALIDATION_FILE: Final = "validation.jsonl"
FAILED_STATUS: Final = 3
"""Exit status of a training process that failed for the reason in `failure.json`."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Item(_Part):
    """One labelled image as a local file; `new` marks what the champion never learned.

    `split` is the part that the snapshot recorded; images of the hold-out are refused.
    """

    path: str
    label: Literal[0, 1]
    generator: str | None = None
    collection: str | None = None
    sha256: str
    group: str | None = None
    split: Split
    new: bool = False


class TrainingJob(_Part):
    """Everything that decides a training beside the images.

    Attributes:
        name: what messages and pictures call it.
        initial: directory of the encoder to begin with (see `encoder.weights.read_weights`); None: fresh weights.
        encoder: fields of `VitConfig` for fresh weights; empty: ViT-Tiny/16.
        start: how fresh weights are drawn: timm's way, or with a patch projection that begins as the whitened
            cosine transform of a patch, in which traces of generators stand out from the first step; unset: timm's
            for the published size, cosine for smaller encoders.
        settings: the hyper-parameters; see `for_device` for those left unset.
        unseen: see `for_encoder`.
        device: as `Settings.device`.
        precision: `auto` is bf16 autocast on CUDA and float32 on a CPU.
        compile: `torch.compile` the encoder; unset: on CUDA.
        evaluated_items: validation images measured each epoch, at most.
        picture_every: epochs between two t-SNE pictures; 0: none.
        limits: what an image may cost.
    """

    format: Literal[1] = 1
    name: str
    initial: str | None = None
    encoder: dict[str, Any] = Field(default_factory=dict)
    start: Literal["timm", "cosine"] | None = None
    settings: TrainingSettings = TrainingSettings()
    unseen: bool = False
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool | None = None
    evaluated_items: int = Field(4000, ge=2)
    picture_every: int = Field(5, ge=0)
    limits: LimitSettings = LimitSettings()


@dataclass(frozen=True, slots=True)
class Scale:
    """The amount that a training computes."""

    epochs: int
    steps_per_epoch: int
    records: int

    @property
    def steps(self) -> int:
        """Optimiser steps at most."""
        return self.epochs * self.steps_per_epoch


_SCALES: Final = {"cuda": Scale(20, 200, 256), "cpu": Scale(10, 40, 48)}


def for_device(settings: TrainingSettings, device: str) -> Scale:
    """The scale that the settings ask for; what they leave unset is what the device can do in hours, not days."""
    usual = _SCALES["cuda" if device.startswith("cuda") else "cpu"]
    return Scale(
        settings.epochs or usual.epochs,
        settings.steps_per_epoch or usual.steps_per_epoch,
        settings.records or usual.records,
    )


@dataclass(frozen=True, slots=True)
class Manner:
    """The parameters of an encoder's training, nothing left unset.

    Attributes:
        learning_rate: peak.
        keep: share of the champion's weights to begin with.
        native: views cut at native resolution instead of resized ones.
    """

    learning_rate: float
    keep: float
    native: bool


def for_encoder(settings: TrainingSettings, image_size: int, *, unseen: bool = False) -> Manner:
    """The manner that the settings ask for; what they leave unset follows the encoder.

    A small encoder that was trained to its end does not see traces that it had no use for. Where it has to learn to
    see some, it begins with half fresh weights and learns faster; what it sees already takes no more than tuning, and
    old generators lose less. It would see no trace at all in a photograph that was resized to its views.

    Args:
        settings: the hyper-parameters.
        image_size: side of the encoder's images, pixels.
        unseen: whether there is a generator that the champion's encoder does not tell from reals.
    """
    small = image_size < IMAGE_SIZE
    usual = Manner(1e-3, 0.5, native=True) if small and unseen else Manner(2e-4, 1.0, native=small)
    return Manner(
        usual.learning_rate if settings.learning_rate is None else settings.learning_rate,
        usual.keep if settings.keep is None else settings.keep,
        usual.native if settings.native is None else settings.native,
    )


def write_job(directory: Path, job: TrainingJob, train: Iterable[Item], validation: Iterable[Item]) -> None:
    """Writes the job into its directory, the description last: a directory with one is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_items(directory / TRAIN_FILE, train)
    _write_items(directory / VALIDATION_FILE, validation)
    with whole_file(directory / JOB_FILE) as partial:
        partial.write_text(job.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _write_items(path: Path, items: Iterable[Item]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{item.model_dump_json()}\n" for item in items)


def read_job(directory: Path) -> TrainingJob:
    """Reads what `write_job` wrote.

    Raises:
        TrainingError: it is missing or not a job of this version.
    """
    try:
        return TrainingJob.model_validate_json((directory / JOB_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise TrainingError(f"{directory / JOB_FILE}: no training job: {error}") from error


def read_items(path: Path) -> list[Item]:
    """The images that a job lists.

    Raises:
        TrainingError: a line that is no item, by its number.
    """
    items = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                items.append(_item(line, f"{path}:{number}"))
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: no text: {error}") from error
    return items


def _item(line: str, where: str) -> Item:
    try:
        return Item.model_validate(json.loads(line))
    except ValueError as error:
        raise TrainingError(f"{where}: no item of a training job: {error}") from error
