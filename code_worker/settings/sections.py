"""The sections of the settings on learning, on where images come from and on what one may cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from code_worker.settings.addresses import endpoint_address
from code_worker.settings.cron import cron_line
from code_worker.system.machine import decode_memory

# Bounds of numbers that have no natural ones: above them clocks, sockets or SQL could no longer take a value.
DAY_S: Final = 86_400
YEAR_S: Final = 365 * DAY_S
MANY_THREADS: Final = 1024
MANY_IMAGES: Final = 1_000_000_000


class Section(BaseModel):
    """A table of the settings: unknown names are refused, values never change, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LabelSettings(Section):
    """Settings by which labels of people and systems become one truth per image."""

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
    min_labellers: int = Field(
        1, ge=1, le=MANY_IMAGES, description="Labellers of new images without whom nothing goes live."
    )
    max_duplicates: int | None = Field(
        5,
        ge=1,
        le=MANY_IMAGES,
        description="New images nearly the same that one labeller may teach; unset (`null`): any number.",
    )


class TrainingSettings(Section):
    """Settings of the encoder's training."""

    epochs: int | None = Field(
        None, ge=1, le=1_000_000, description="Epochs at most; unset: 20 on CUDA, 10 on a CPU."
    )
    steps_per_epoch: int | None = Field(
        None, ge=1, le=1_000_000, description="Optimiser steps in an epoch; unset: 200 on CUDA, 40 on a CPU."
    )
    records: int | None = Field(
        None,
        ge=2,
        le=1_000_000,
        description="Records (one real and one generated image) in a step, per process; unset: 256 on CUDA, 48 on "
        "a CPU.",
    )
    accumulate: int = Field(
        1, ge=1, le=1_000_000, description="Parts in which a step's records are computed, to save memory."
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Peak; from scratch the published one is 2e-3; unset: 2e-4, or 1e-3 where an encoder smaller "
        "than the published one does not see a new generator.",
    )
    weight_decay: float = Field(2e-5, ge=0, le=1000, description="AdamW's.")
    warmup_epochs: float = Field(0.5, ge=0, le=1_000_000, description="Epochs of linear warm-up from 1e-6.")
    patience: int = Field(
        6,
        ge=1,
        le=1_000_000,
        description="Epochs without a better linear head on the validation part before it stops.",
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
        le=1,
        description="A trained encoder is drawn back towards the champion's until no group of the validation part "
        "loses more than this of the probability that a linear head gives to what is right; unset (`null`): not.",
    )
    from_scratch: bool = Field(False, description="Begin with fresh weights instead of the champion's.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of everything random.")
    processes: int = Field(
        1, ge=1, le=MANY_THREADS, description="Processes (one per GPU) that torchrun starts on this machine."
    )
    loader_processes: int | None = Field(
        None, ge=0, le=MANY_THREADS, description="Processes that prepare views; unset: by cores."
    )
    timeout_s: int = Field(
        86_400, ge=60, le=YEAR_S, description="A retrain that takes longer is ended and recorded as failed."
    )
    lease_s: float = Field(
        60,
        ge=1,
        le=DAY_S,
        description="A run whose process gives no sign of life for so long is taken over by another.",
    )
    max_attempts: int = Field(
        10, ge=1, le=1000, description="Processes that may die over one run before it is recorded as failed."
    )


class GateSettings(Section):
    """Settings of the gate: what a candidate must prove before it replaces the champion."""

    max_regression: float = Field(
        0.02, gt=0, le=1, description="Loss of accuracy that must be excluded, for the reals and for all old fakes."
    )
    error: float = Field(
        0.05, gt=0, lt=0.5, description="Chance of each kind of error of the gate, that over a reign included."
    )
    max_label_noise: float = Field(
        0.15, ge=0, le=1, description="Share of labels of one class that their neighbours contradict."
    )
    golden: str | None = Field(
        None,
        description="Data set of your own on which nothing may get worse; its images and near-duplicates of them are "
        "never learned from.",
    )
    golden_sha256: str | None = Field(None, description="Its hash, as `code-worker data pin` prints it.")
    max_golden_loss: float = Field(
        0.005, ge=0, le=1, description="Area under the ROC curve that may be lost on the golden set."
    )
    max_disagreement: float = Field(
        3.0,
        gt=0,
        le=1_000_000,
        description="How much more a labeller's new labels may disagree with their neighbours than old ones.",
    )
    min_agreement: float | None = Field(
        0.97,
        ge=0,
        le=1,
        description="Share of old images that the champion judges rightly of which both must say the same.",
    )
    max_psi: float | None = Field(
        0.2, gt=0, le=1_000_000, description="Largest population stability index of scores of old images."
    )
    bootstrap: int = Field(1000, ge=100, le=100_000, description="Resamples of the bootstrap in reports.")
    promote: bool = Field(True, description="Promote by itself what passes; else it becomes the challenger.")


class ScheduleSettings(Section):
    """Times at which the detector learns by itself; unset: only when told to."""

    retrain: str | None = Field(None, description="Cron line in UTC, such as `0 3 * * sun`.")
    refit: str | None = Field(None, description="Cron line in UTC for refitting the heads alone.")
    calibrate: bool = Field(
        False,
        description="After a promotion draw anew the thresholds of policies that were calibrated on another release.",
    )
    min_new_real: int = Field(
        20, ge=0, le=MANY_IMAGES, description="Real images new to the champion, below which a run waits."
    )
    min_new_fake: int = Field(
        50, ge=0, le=MANY_IMAGES, description="Generated images new to it, below which a run waits."
    )
    min_holdout: int = Field(
        20, ge=1, le=MANY_IMAGES, description="Images of each class in the hold-out, below which it waits."
    )

    @field_validator("retrain", "refit")
    @classmethod
    def _is_cron_line(cls, line: str | None) -> str | None:
        return None if line is None else cron_line(line)


class ShadowSettings(Section):
    """Settings by which a challenger is compared with the champion."""

    share: float = Field(1.0, ge=0, le=1, description="Share of judged images that it scores too, by content hash.")


_BUCKET: Final = re.compile(r"[A-Za-z0-9._\-]{1,255}|arn:[^/]+")
"""What botocore accepts: AWS allows fewer names, older buckets and other servers more; ARNs are of access points."""


class S3Settings(Section):
    """Settings of the object store."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; unset means AWS.")
    region: str | None = Field(None, description="Region; unset leaves it to the AWS configuration chain.")
    access_key_id: SecretStr | None = Field(None, description="Access key; unset leaves it to the AWS chain.")
    secret_access_key: SecretStr | None = Field(None, description="Secret key that goes with `access_key_id`.")
    buckets: tuple[str, ...] = Field(
        (), description="Buckets (or `bucket/prefix`) that may be read. Empty means none: nothing is read from S3."
    )
    path_style: bool = Field(False, description="Put the bucket in the path; most S3-compatible servers need it.")
    connect_timeout_s: float = Field(3.0, gt=0, le=DAY_S, description="Limit for opening a connection.")
    read_timeout_s: float = Field(5.0, gt=0, le=DAY_S, description="Limit between two chunks of a body.")
    object_timeout_s: float = Field(
        30.0, gt=0, le=DAY_S, description="Wall-clock limit for one object, retries included."
    )
    max_attempts: int = Field(4, ge=1, le=100, description="Tries of one request (botocore's standard mode).")
    body_attempts: int = Field(
        3, ge=1, le=100, description="Tries of a body that was cut short; botocore never retries one."
    )
    checksum_mode: bool = Field(
        True,
        description="Send checksums of what is written and verify those of what is read. Backblaze B2, Cloudflare R2 "
        "and other servers that refuse these headers need `false`.",
    )
    anonymous: tuple[str, ...] = Field(
        (), description="Buckets that are public: requests to them are not signed. They must be in `buckets` too."
    )
    requester_pays: tuple[str, ...] = Field(
        (), description="Buckets whose readers pay, which every request to them then agrees to."
    )

    @field_validator("buckets", "anonymous", "requester_pays")
    @classmethod
    def _read_buckets(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        found = tuple(name.removeprefix("s3://") for name in names)
        if any("://" in name for name in found):
            raise ValueError("write the name of the bucket and no address, such as uploads or s3://uploads")
        if not all(_BUCKET.fullmatch(name.partition("/")[0]) for name in found):
            raise ValueError("a bucket's name has only letters, digits and . - _, such as uploads")
        return found

    @field_validator("endpoint_url")
    @classmethod
    def _read_endpoint(cls, url: str | None) -> str | None:
        return None if url is None else endpoint_address(url)


class FileSettings(Section):
    """Local files that may be read."""

    roots: tuple[Path, ...] = Field(
        (), description="Directories under which `file://` and paths may be read. Empty means none."
    )


class LimitSettings(Section):
    """Limits on what an image may cost before it is refused."""

    max_bytes: int = Field(50 * 2**20, gt=0, le=2**34, description="Largest file, enforced while it streams in.")
    max_pixels: int = Field(50_000_000, gt=0, le=2**40, description="Largest width x height, read from the header.")
    max_side: int = Field(16_384, gt=0, le=2**31 - 1, description="Longest side, read from the header.")
    min_side: int = Field(1, ge=1, le=2**31 - 1, description="Shortest side that is judged.")
    max_decode_bytes: int = Field(
        default_factory=decode_memory,
        gt=0,
        le=2**44,
        description="Memory that one process decodes in, told from headers: large images wait for each other, and "
        "one that takes more is refused. Unset: 280000000, enough for 50 million pixels in most files, 23 million of "
        "a WebP; in a container that may have less than four times as much, a quarter of its memory.",
    )
