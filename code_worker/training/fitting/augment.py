"""The augmentations of CoDE: RGB images in, RGB images out, and how they are drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from code_worker.types import IMAGE_SIZE

if TYPE_CHECKING:
    from numpy.random import Generator


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


_MOST = 2


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One way to change an RGB image, and how far.

    Attributes:
        name: as reports and tests have it.
        low: the least strength that is drawn.
        high: the greatest.
        identity: strength at which no pixel changes, within the range or not; None if there is none.
        in_pixels: the strength is a side in pixels, stated for views of 224 and in proportion for others.
        apply: image, strength and a generator for what else is left to chance.
    """

    name: str
    low: float
    high: float
    identity: float | None
    apply: Callable[[Image.Image, float, Generator], Image.Image]
    in_pixels: bool = False

    def limits(self, size: int) -> tuple[float, float]:
        """Least and greatest strength for views of this size."""
        factor = size / IMAGE_SIZE if self.in_pixels else 1.0
        return self.low * factor, self.high * factor


def _plain(function: Callable[[Image.Image, float], Image.Image]) -> Callable[..., Image.Image]:
    return lambda image, strength, _: function(image, strength)


def _without_strength(function: Callable[[Image.Image], Image.Image]) -> Callable[..., Image.Image]:
    return lambda image, *_: function(image)


AUGMENTATIONS: Final[tuple[Augmentation, ...]] = (
    # The radius is in pixels and yet the same for all sizes: it blurs traces, and those are as wide in every crop.
    Augmentation("blur", 0.1, 2, 0, _plain(blur)),
    Augmentation("brightness", 0.5, 2, 1, _plain(brightness)),
    Augmentation("aspect_ratio", 0.75, 2, 1, _plain(change_aspect)),
    Augmentation("pixelisation", 0.3, 1, 1, _plain(pixelate)),
    Augmentation("rotation", 90, 270, 0, _plain(rotate)),
    Augmentation("contrast", 0.5, 1.5, 1, _plain(contrast)),
    Augmentation("saturation", 0.5, 1.5, 1, _plain(saturation)),
    Augmentation("jpeg", 40, 100, None, _plain(jpeg)),
    Augmentation("greyscale", 1, 1, None, _without_strength(greyscale)),
    Augmentation("flip", 1, 1, None, _without_strength(flip)),
    Augmentation("opacity", 0.2, 1, 1, _plain(opacity)),
    Augmentation("stripes", 0.05, 0.35, 0, _plain(overlay_stripes)),
    Augmentation("pad", 0.01, 0.25, 0, _plain(pad)),
    Augmentation("resize", 64, 512, None, _plain(resize_square), in_pixels=True),
    Augmentation("crop", 64, 512, None, random_crop, in_pixels=True),
    Augmentation("scale", 0.5, 1.5, 1, _plain(scale)),
    Augmentation("sharpen", 1.2, 2, 1, _plain(sharpen)),
    Augmentation("shuffle", 0, 0.35, 0, shuffle_pixels),
    Augmentation("skew", -1, 1, 0, _plain(skew)),
)
"""In the published order, which is also the order of application; the functions say what a strength means.

The published code draws most strengths from five even steps of the range and always shuffles the same pixels; here
every strength of a range is as likely as any other, and so is every pixel.
"""


@dataclass(frozen=True, slots=True)
class Augmenter:
    """Draws none, one or two augmentations for an image that becomes a view of `size` pixels."""

    size: int = IMAGE_SIZE

    def draw(self, rng: Generator) -> list[tuple[Augmentation, float]]:
        """Different augmentations in list order, each with its strength."""
        count = int(rng.integers(_MOST + 1))
        chosen = sorted(rng.choice(len(AUGMENTATIONS), size=count, replace=False).tolist())
        limits = ((AUGMENTATIONS[index], AUGMENTATIONS[index].limits(self.size)) for index in chosen)
        return [(augmentation, float(rng.uniform(low, high))) for augmentation, (low, high) in limits]

    def __call__(self, image: Image.Image, rng: Generator) -> Image.Image:
        """The image after what `draw` says, of the size that is left."""
        for augmentation, strength in self.draw(rng):
            image = augmentation.apply(image, strength, rng)
        return image
