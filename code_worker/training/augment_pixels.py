"""Augmentations that change colours and detail and leave every pixel in its place, or nearly: RGB in, RGB out."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = [
    "blur",
    "brightness",
    "contrast",
    "greyscale",
    "jpeg",
    "opacity",
    "overlay_stripes",
    "pixelate",
    "saturation",
    "sharpen",
    "shuffle_pixels",
]

_WHITE = (255, 255, 255)
_STRIPES_PER_SIDE = 2


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Gaussian blur; the radius is in pixels, and 0 changes nothing."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiplies every value: 1 changes nothing, less darkens."""
    return ImageEnhance.Brightness(image).enhance(factor)


def pixelate(image: Image.Image, ratio: float) -> Image.Image:
    """Shrinks both sides to this part and stretches them back, bicubic both ways; 1 changes nothing."""
    small = (max(1, int(image.width * ratio)), max(1, int(image.height * ratio)))
    return image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Moves values away from the mean grey (over 1) or towards it (under 1)."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Moves colours away from grey (over 1) or towards it (under 1)."""
    return ImageEnhance.Color(image).enhance(factor)


def jpeg(image: Image.Image, quality: float) -> Image.Image:
    """Goes through a JPEG of this quality, 0–100, colours subsampled; there is no quality that loses nothing."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(quality))
    with Image.open(buffer) as decoded:
        decoded.load()
        return decoded.convert("RGB")


def greyscale(image: Image.Image) -> Image.Image:
    """The luminance (ITU-R 601-2) in all three channels."""
    return image.convert("L").convert("RGB")


def opacity(image: Image.Image, level: float) -> Image.Image:
    """Lays the image over white with this opacity; 1 changes nothing."""
    return Image.blend(Image.new("RGB", image.size, _WHITE), image, level)


def overlay_stripes(image: Image.Image, line_width: float) -> Image.Image:
    """White horizontal stripes, two per shorter side, one through the middle, each this part of its period wide."""
    period = min(image.size) / _STRIPES_PER_SIDE
    rows = np.arange(image.height) - image.height / 2
    # Distance to the middle of the nearest stripe.
    distances = np.abs((rows + period / 2) % period - period / 2)
    pixels = np.array(image)
    pixels[distances < line_width * period / 2] = _WHITE
    return Image.fromarray(pixels)


def sharpen(image: Image.Image, factor: float) -> Image.Image:
    """Moves pixels away from their smoothed neighbourhood; 1 changes nothing."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def shuffle_pixels(image: Image.Image, part: float, rng: Generator) -> Image.Image:
    """Exchanges this part of the pixels, chosen by chance, among each other."""
    pixels = np.array(image)
    flat = pixels.reshape(-1, 3)
    chosen = rng.choice(len(flat), size=int(part * len(flat)), replace=False)
    flat[chosen] = flat[rng.permutation(chosen)]
    return Image.fromarray(pixels)
