"""The augmentations of CoDE: the list, its ranges, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from code_worker.training import augment_geometry as geometry
from code_worker.training import augment_pixels as pixels
from code_worker.types import IMAGE_SIZE

if TYPE_CHECKING:
    from numpy.random import Generator
    from PIL import Image

__all__ = ["AUGMENTATIONS", "Augmentation", "Augmenter"]

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
    Augmentation("blur", 0.1, 2, 0, _plain(pixels.blur)),
    Augmentation("brightness", 0.5, 2, 1, _plain(pixels.brightness)),
    Augmentation("aspect_ratio", 0.75, 2, 1, _plain(geometry.change_aspect)),
    Augmentation("pixelisation", 0.3, 1, 1, _plain(pixels.pixelate)),
    Augmentation("rotation", 90, 270, 0, _plain(geometry.rotate)),
    Augmentation("contrast", 0.5, 1.5, 1, _plain(pixels.contrast)),
    Augmentation("saturation", 0.5, 1.5, 1, _plain(pixels.saturation)),
    Augmentation("jpeg", 40, 100, None, _plain(pixels.jpeg)),
    Augmentation("greyscale", 1, 1, None, _without_strength(pixels.greyscale)),
    Augmentation("flip", 1, 1, None, _without_strength(geometry.flip)),
    Augmentation("opacity", 0.2, 1, 1, _plain(pixels.opacity)),
    Augmentation("stripes", 0.05, 0.35, 0, _plain(pixels.overlay_stripes)),
    Augmentation("pad", 0.01, 0.25, 0, _plain(geometry.pad)),
    Augmentation("resize", 64, 512, None, _plain(geometry.resize_square), in_pixels=True),
    Augmentation("crop", 64, 512, None, geometry.random_crop, in_pixels=True),
    Augmentation("scale", 0.5, 1.5, 1, _plain(geometry.scale)),
    Augmentation("sharpen", 1.2, 2, 1, _plain(pixels.sharpen)),
    Augmentation("shuffle", 0, 0.35, 0, pixels.shuffle_pixels),
    Augmentation("skew", -1, 1, 0, _plain(geometry.skew)),
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
        """The image after what `draw` says, of whatever size that leaves."""
        for augmentation, strength in self.draw(rng):
            image = augmentation.apply(image, strength, rng)
        return image
