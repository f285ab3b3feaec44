"""Images to measure with: mosaics of the photographs that scikit-learn and scikit-image ship, no two alike."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from bench.photographs import HELD_OUT, LEARNED_FROM, Album

__all__ = ["FORMS", "SIZES", "Kind", "make_images"]

SIZES = ((256, 256), (640, 480), (1024, 1024), (1920, 1080), (4000, 3000))
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("JPEG", "jpg", {"quality": 88}),
    "progressive": ("JPEG", "jpg", {"quality": 88, "progressive": True}),
    "png": ("PNG", "png", {}),
    "webp": ("WEBP", "webp", {"quality": 85}),
}
"""Pillow's name of a form, its suffix and how it is written."""
_PHOTOGRAPHS = tuple(name for name in (*LEARNED_FROM, *HELD_OUT) if name.startswith(("sklearn/", "skimage/")))
_TILE = (200, 700)


@dataclass(frozen=True, slots=True)
class Kind:
    """Size and form of the images of one comparison."""

    width: int
    height: int
    form: str

    @classmethod
    def parse(cls, text: str) -> Kind:
        """From `640x480-jpeg`.

        Raises:
            SystemExit: no such size or form.
        """
        size, _, form = text.partition("-")
        width, _, height = size.partition("x")
        if not (width.isdecimal() and height.isdecimal() and form in FORMS):
            raise SystemExit(f"{text!r} is none of WxH-{{{','.join(FORMS)}}}, such as 640x480-jpeg")
        return cls(int(width), int(height), form)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}-{self.form}"


def make_images(directory: Path, kind: Kind, count: int, seed: int = 0) -> list[Path]:
    """Files of one kind in a directory, which is created; those that lie there already are taken as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    name, suffix, options = FORMS[kind.form]
    album = Album(_PHOTOGRAPHS)
    paths = [directory / f"{number:05}.{suffix}" for number in range(count)]

    def write(number: int) -> None:
        if not paths[number].exists():
            rng = np.random.default_rng((seed, number))
            Image.fromarray(mosaic(album, rng, kind.width, kind.height)).save(paths[number], name, **options)

    # Pillow lets go of the interpreter while it compresses.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(count)))
    return paths


def mosaic(album: Album, rng: Generator, width: int, height: int) -> NDArray[np.uint8]:
    """`(height, width, 3) uint8`: rows of pieces of photographs near their own resolution, so that detail is natural.

    A single photograph enlarged to the size would be smooth, and cheaper to decode than what cameras write.
    """
    canvas = np.empty((height, width, 3), np.uint8)
    top = 0
    while top < height:
        side = int(rng.integers(*_TILE))
        rows = min(side, height - top)
        left = 0
        while left < width:
            _, piece = album.piece(rng, side)
            columns = min(side, width - left)
            canvas[top : top + rows, left : left + columns] = _enlarged(piece, side)[:rows, :columns]
            left += columns
        top += rows
    return canvas


def _enlarged(piece: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Pieces of small photographs come smaller than asked for."""
    if piece.shape[0] == side:
        return piece
    return np.asarray(Image.fromarray(piece).resize((side, side), Image.Resampling.BICUBIC))
