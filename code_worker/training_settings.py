"""The sections of the settings on learning: what labels say, and how a retrain trains."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["LabelSettings", "Section", "TrainingSettings"]


class Section(BaseModel):
    """A table of the settings: unknown names are refused, values never change, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LabelSettings(Section):
    """How labels of people and systems become one truth per image."""

    rule: Literal["latest", "majority", "unanimous", "trusted"] = Field(
        "latest",
        description="Which label holds where several contradict: the last said; the one most labellers say (a tie is "
        "left out); only what all say; or the last of the most trusted labeller (`trusted`, in its order).",
    )
    trusted: tuple[str, ...] = Field((), description="Labellers by falling trust; others come after, the last first.")
    ignored: tuple[str, ...] = Field((), description="Labellers whose statements do not count.")
    max_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the new images that one labeller may have in a snapshot, once several label; what is "
        "over is left out. `trusted` ones are not cut. Unset: any.",
    )
    min_labellers: int = Field(1, ge=1, description="Labellers of new images without whom nothing goes live.")
    max_duplicates: int | None = Field(
        5, ge=1, description="New images nearly the same that one labeller may teach; unset (`null`): any number."
    )


class TrainingSettings(Section):
    """How a retrain trains the encoder, and on what."""

    epochs: int | None = Field(None, ge=1, description="Epochs at most; unset: 20 on CUDA, 10 on a CPU.")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="Optimiser steps in an epoch; unset: 200 on CUDA, 40 on a CPU."
    )
    records: int | None = Field(
        None,
        ge=2,
        description="Records (one real and one generated image) in a step, per process; unset: 256 on CUDA, 48 on "
        "a CPU.",
    )
    accumulate: int = Field(1, ge=1, description="Parts in which a step's records are computed, to save memory.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak; from scratch the published one is 2e-3; unset: 2e-4, or 1e-3 where an encoder smaller "
        "than the published one does not see a new generator.",
    )
    weight_decay: float = Field(2e-5, ge=0, description="AdamW's.")
    warmup_epochs: float = Field(0.5, ge=0, description="Epochs of linear warm-up from 1e-6.")
    patience: int = Field(
        6, ge=1, description="Epochs without a better linear head on the validation part before it stops."
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="Average weights with this decay; unset: not.")
    new_share: float = Field(
        0.5, ge=0, le=1, description="Share of a step's fakes drawn from generators the champion never learned."
    )
    native: bool | None = Field(
        None,
        description="Views cut at native resolution, as inference sees images, instead of resized ones as published; "
        "unset: for encoders smaller than the published one.",
    )
    keep: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the champion's weights that a retrain begins with, the rest fresh ones (shrink and "
        "perturb): less learns new traces sooner and forgets more; unset: 1, or 0.5 where an encoder "
        "smaller than the published one does not see a new generator.",
    )
    max_forgetting: float | None = Field(
        0.005,
        ge=0,
        description="A trained encoder is drawn back towards the champion's until no group of the validation part "
        "loses more than this of the probability that a linear head gives to what is right; unset (`null`): not.",
    )
    from_scratch: bool = Field(False, description="Begin with fresh weights instead of the champion's.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    processes: int = Field(1, ge=1, description="Processes (one per GPU) that torchrun starts on this machine.")
    loader_processes: int | None = Field(None, ge=0, description="Processes that prepare views; unset: by cores.")
    timeout_s: int = Field(86_400, ge=60, description="A retrain that takes longer is ended and recorded as failed.")
    lease_s: float = Field(
        60, ge=1, description="A run whose process gives no sign of life for so long is taken over by another."
    )
    max_attempts: int = Field(
        10, ge=1, description="Processes that may die over one run before it is recorded as failed."
    )
