"""Toy records on disk: a piece of a photograph and what each toy generator makes of it, as files of mixed formats."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from bench.photographs import Album
from code_worker.demo.toy_images import GENERATORS
from code_worker.training.fitting.job import Item

if TYPE_CHECKING:
    from code_worker.demo.toy_images import Simulation

__all__ = ["encode", "random_form", "write_records"]

_FORMS = (("PNG", "png", 0), ("JPEG", "jpg", 90), ("JPEG", "jpg", 95), ("WEBP", "webp", 92))


def write_records(
    directory: Path,
    album: Album,
    count: int,
    *,
    seed: int,
    size: int,
    generators: Mapping[str, Simulation] = GENERATORS,
    new: bool = False,
) -> list[Item]:
    """Writes `count` records of one real and one generated image each, the generators in turn; returns the items.

    Both images of a record have the same format and quality, so that neither tells which is which.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng, names, items = np.random.default_rng(seed), list(generators), list[Item]()
    for number in range(count):
        photograph, real = album.piece(rng, size)
        name = names[number % len(names)]
        form = random_form(rng)
        for label, pixels in ((0, real), (1, generators[name](real, rng))):
            data = encode(pixels, form)
            sha256 = hashlib.sha256(data).hexdigest()
            path = directory / f"{sha256}.{form[1]}"
            path.write_bytes(data)
            made_by = name if label else None
            items.append(
                Item(
                    path=str(path),
                    label=label,
                    generator=made_by,
                    collection=photograph,
                    sha256=sha256,
                    group=f"{seed}-{number}",
                    split="train",
                    new=new,
                )
            )
    return items


def encode(pixels: NDArray[np.uint8], form: tuple[str, str, int]) -> bytes:
    """A file of one of the forms."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form[0], **({"quality": form[2]} if form[2] else {}))
    return out.getvalue()


def random_form(rng: Generator) -> tuple[str, str, int]:
    """Format, suffix and quality."""
    return _FORMS[rng.integers(len(_FORMS))]
