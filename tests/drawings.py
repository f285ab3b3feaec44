"""Pictures that are no photographs, drawn from seeds: symmetric, plain, sparse or transparent ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw, ImageFont

__all__ = ["PLAIN", "symmetric_blobs", "text_page", "transparent_logo"]

SIDE = 320


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.broadcast_to(levels, (SIDE, SIDE)).astype(np.uint8))


def symmetric_blobs(seed: int) -> Image.Image:
    """Smooth blobs, the right half a mirror image of the left one."""
    half = default_rng(seed).random((8, 4)) * 255
    return _enlarged(np.concatenate([half, half[:, ::-1]], axis=1))


def _ornament(seed: int) -> Image.Image:
    """Smooth blobs, mirrored to the right and below."""
    quarter = default_rng(seed).random((5, 5)) * 255
    half = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    return _enlarged(np.concatenate([half, half[::-1]]))


def _enlarged(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _symmetric_logo(seed: int) -> Image.Image:
    rng, image = default_rng(seed), Image.new("RGB", (SIDE, SIDE), "white")
    draw, middle = ImageDraw.Draw(image), SIDE // 2
    for colour in ("red", "blue", "green"):
        half, top, height = (int(rng.integers(*span)) for span in ((15, 140), (5, 200), (15, 110)))
        _shape(draw, rng)((middle - half, top, middle + half - 1, top + height), fill=colour)
    return image


def _gradient(seed: int) -> Image.Image:
    """In any direction, over 50 grey levels or more."""
    rng = default_rng(seed)
    angle, span = (seed * math.pi / 4 if seed < 8 else rng.uniform(0, 2 * math.pi)), int(rng.integers(50, 256))
    down, right = np.mgrid[0:SIDE, 0:SIDE]
    ramp = math.sin(angle) * down + math.cos(angle) * right
    return _grey((255 - span) // 2 + span * (ramp - ramp.min()) / np.ptp(ramp))


def _stripes(seed: int) -> Image.Image:
    rng = default_rng(seed)
    width = int(rng.integers(8, 100))
    bands = (np.arange(SIDE) + rng.integers(width)) // width % 2 * 200 + 20
    return _grey(bands if seed % 2 else bands[:, None])


def _disc(seed: int) -> Image.Image:
    image, radius, middle = Image.new("L", (SIDE, SIDE), 255), 12 + 9 * seed, SIDE // 2
    ImageDraw.Draw(image).ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=0)
    return image


def text_page(seed: int) -> Image.Image:
    """A white page as large as a telephone's screen, with one to three lines of small print."""
    rng, image = default_rng(seed), Image.new("RGB", (540, 960), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(10)
    for _ in range(int(rng.integers(1, 4))):
        line = "".join(
            chr(97 + letter) if letter < 26 else " " for letter in rng.integers(30, size=rng.integers(25, 50))
        )
        draw.text((int(rng.integers(20, 250)), int(rng.integers(20, 920))), line, fill="black", font=font)
    return image


def transparent_logo(seed: int, colour: str) -> Image.Image:
    """Shapes of one colour; all that is transparent is of that colour, too, as drawing programs leave it."""
    rng, mask = default_rng(seed), Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(mask)
    for _ in range(3):
        left, top, width, height = (int(rng.integers(*span)) for span in ((15, 250), (15, 250), (20, 120), (20, 120)))
        _shape(draw, rng)((left, top, min(left + width, SIDE - 9), min(top + height, SIDE - 9)), fill=255)
    image = Image.new("RGBA", (SIDE, SIDE), colour)
    image.putalpha(mask)
    return image


def _shape(draw: ImageDraw.ImageDraw, rng: Generator) -> Callable[..., None]:
    return draw.ellipse if rng.random() < 0.5 else draw.rectangle


PLAIN: dict[str, Callable[[int], Image.Image]] = {
    "blobs": symmetric_blobs,
    "ornament": _ornament,
    "logo": _symmetric_logo,
    "gradient": _gradient,
    "stripes": _stripes,
    "disc": _disc,
    "text": text_page,
}
"""Kinds of opaque pictures, each drawn from a seed."""
