"""Training jobs of seconds: a few small images, a miniature encoder."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from code_worker.settings import TrainingSettings
from code_worker.training.fitting.job import Item, TrainingJob, write_job

MINIATURE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 48,
    "depth": 1,
    "heads": 3,
    "mlp_width": 96,
}


def picture(rng: Generator, *, fake: bool, side: int = 64) -> NDArray[np.uint8]:
    """Blurred noise; a generated one has every second pixel twice."""
    coarse = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = np.clip(pixels + rng.integers(-30, 31, pixels.shape), 0, 255).astype(np.uint8)
    return pixels[::2, ::2].repeat(2, axis=0).repeat(2, axis=1) if fake else pixels


def write_items(
    directory: Path, count: int, *, seed: int = 0, held_out: bool = False, new: bool = False
) -> list[Item]:
    """`count` real and `count` generated images as PNG files, in training or in the hold-out."""
    directory.mkdir(parents=True, exist_ok=True)
    rng, items = np.random.default_rng(seed), list[Item]()
    while len(items) < 2 * count:
        label = len(items) % 2
        out = io.BytesIO()
        Image.fromarray(picture(rng, fake=bool(label))).save(out, "PNG")
        sha256 = hashlib.sha256(out.getvalue()).hexdigest()
        path = directory / f"{sha256}.png"
        path.write_bytes(out.getvalue())
        items.append(
            Item(
                path=str(path),
                label=label,  # type: ignore[arg-type]  # 0 or 1
                generator="doubled" if label else None,
                sha256=sha256,
                split="holdout" if held_out else "train",
                new=new,
            )
        )
    return items


def small_job(name: str = "test", **settings: Any) -> TrainingJob:
    """Two epochs of four steps, unless told otherwise."""
    usual = {"epochs": 2, "steps_per_epoch": 4, "records": 8, "learning_rate": 1e-3, "loader_processes": 0}
    return TrainingJob(
        name=name,
        encoder=MINIATURE,
        start="cosine",
        picture_every=0,
        device="cpu",
        settings=TrainingSettings(**{**usual, **settings}),
    )


def write_small_job(directory: Path, job: TrainingJob | None = None, *, train: int = 12, validation: int = 8) -> Path:
    """A job directory with images of its own."""
    images = directory.parent / f"{directory.name}-images"
    write_job(
        directory,
        job or small_job(),
        write_items(images / "train", train),
        write_items(images / "validation", validation, seed=1),
    )
    return directory


def items(*kinds: tuple[int, str | None, str | None, bool]) -> list[Item]:
    """Items of label, generator, group and newness, without files."""
    return [
        Item(path="", label=label, generator=generator, group=group, split="train", new=new, sha256=f"{number:064}")  # type: ignore[arg-type]  # 0 or 1
        for number, (label, generator, group, new) in enumerate(kinds)
    ]
