"""Augmentations that move pixels or change the sides: RGB in, RGB out, at least one pixel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["change_aspect", "flip", "pad", "random_crop", "resize_square", "rotate", "scale", "skew"]


def change_aspect(image: Image.Image, ratio: float) -> Image.Image:
    """Stretches to this width : height and keeps the area; a square stays as it is at 1."""
    area = image.width * image.height
    width = max(1, int(math.sqrt(ratio * area)))
    return image.resize((width, max(1, int(area / width))), Image.Resampling.BICUBIC)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Turns counter-clockwise and keeps the largest upright rectangle that holds nothing but picture."""
    turn = math.radians(degrees)
    width, height = (max(1, int(side + 1e-6)) for side in _inscribed(image.width, image.height, turn))
    cos, sin = math.cos(turn), math.sin(turn)
    # From a pixel of the result to the one it shows: around the middle of the one, then from the middle of the other.
    from_x = image.width / 2 - cos * width / 2 + sin * height / 2
    from_y = image.height / 2 - sin * width / 2 - cos * height / 2
    matrix = (cos, -sin, from_x, sin, cos, from_y)
    return image.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def flip(image: Image.Image) -> Image.Image:
    """Exchanges left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def pad(image: Image.Image, part: float) -> Image.Image:
    """A black frame, on every side this part of the image's width or height."""
    across, down = int(part * image.width), int(part * image.height)
    return image.crop((-across, -down, image.width + across, image.height + down))


def resize_square(image: Image.Image, side: float) -> Image.Image:
    """Stretches to a square of this side in pixels, bicubic."""
    return image.resize((round(side), round(side)), Image.Resampling.BICUBIC)


def random_crop(image: Image.Image, side: float, rng: Generator) -> Image.Image:
    """A square of this side in pixels from anywhere; a shorter image lies anywhere within it, on black."""
    pixels = round(side)
    left, top = (_start(length - pixels, rng) for length in image.size)
    return image.crop((left, top, left + pixels, top + pixels))


def scale(image: Image.Image, factor: float) -> Image.Image:
    """Multiplies both sides; 1 changes nothing."""
    sides = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
    return image.resize(sides, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BILINEAR)


def skew(image: Image.Image, factor: float) -> Image.Image:
    """Shears along the width around the middle row, a row's shift being its distance times this; black comes in."""
    matrix = (1, factor, -factor * image.height / 2, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _start(spare: int, rng: Generator) -> int:
    return int(rng.integers(min(spare, 0), max(spare, 0) + 1))


def _inscribed(width: int, height: int, turn: float) -> tuple[float, float]:
    """Sides of the largest upright rectangle within one of these sides that is turned around its middle."""
    sin, cos = abs(math.sin(turn)), abs(math.cos(turn))
    longer, shorter = max(width, height), min(width, height)
    if shorter <= 2 * sin * cos * longer + 1e-9:
        # A thin one: two opposite corners lie on the middles of the long sides.
        along, upright = shorter / 2 / sin, shorter / 2 / cos
        return (along, upright) if width >= height else (upright, along)
    # All four corners touch: the turned sides w·cos + h·sin and w·sin + h·cos are the original ones.
    spread = cos * cos - sin * sin
    return (width * cos - height * sin) / spread, (height * cos - width * sin) / spread
