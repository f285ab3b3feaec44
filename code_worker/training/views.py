"""The eight views of a record that the contrastive objective compares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from code_worker.training.augment import Augmenter
from code_worker.types import IMAGE_SIZE

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

__all__ = ["GLOBAL_SCALE", "LOCAL_SCALE", "ViewSettings", "record_views"]

GLOBAL_SCALE: Final = (0.4, 1.0)
LOCAL_SCALE: Final = (0.05, 0.4)
"""Part of the image's area that a global or local view shows."""

_CROP_PART = 0.9
_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10
_DETAIL = 2
_LONGEST = 4
_AUGMENTED_WINDOW = 2
_WHOLE_WINDOW = 1.5


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """How views are made.

    Attributes:
        size: side of a view in pixels, 16 or more.
        resize: as published: every view is stretched to its size. Without, plain and augmented views are cut out at
            the resolution that the file has, as inference does, and show the traces of a generator pixel by pixel;
            global and local ones are stretched still, as comparing the whole with a part asks for, but the whole is
            a window little larger than a view.

    Raises:
        ValueError: a smaller size.
    """

    size: int = IMAGE_SIZE
    resize: bool = True

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"a view is at least 16 pixels wide, not {self.size}")


def record_views(real: Image.Image, fake: Image.Image, rng: Generator, settings: ViewSettings) -> NDArray[np.uint8]:
    """Plain, augmented, global and local view of a real image, then of a generated one.

    Global and local views are random resized crops (40–100 % and 5–40 % of the area, sides within 3 : 4), augmented.
    With `resize` all views, augmented or not, are at last stretched until the shorter side is `floor(size / 0.9)`,
    bicubic, and the centre is taken. Without, a square from anywhere is taken as it is, and what is too small lies on
    black. There augmentations see a window twice as wide as the view, so that it is still full when rotated or scaled
    by half, and global and local views are parts of a window 1½ times as wide.

    Args:
        real: Of any mode that Pillow converts to RGB.
        fake: One of its generated siblings, or any generated image.
        rng: The only source of chance: equal states give equal views.
        settings: Size and kind.

    Returns:
        `(8, size, size, 3) uint8`, in the order of `objective.VIEWS`.
    """
    views = np.empty((2, 4, settings.size, settings.size, 3), dtype=np.uint8)
    make = _stretched_views if settings.resize else _native_views
    for image, four in zip((real, fake), views, strict=True):
        make(image if image.mode == "RGB" else image.convert("RGB"), rng, settings.size, four)
    return views.reshape(8, *views.shape[2:])


def _stretched_views(image: Image.Image, rng: Generator, size: int, views: NDArray[np.uint8]) -> None:
    augment = Augmenter(size)
    small = _reduced(image, size)
    views[0] = _stretched_centre(small, size)
    views[1] = _stretched_centre(augment(small, rng), size)
    for view, scale in zip(views[2:], (GLOBAL_SCALE, LOCAL_SCALE), strict=True):
        view[:] = _stretched_centre(augment(_random_resized_crop(image, size, scale, rng), rng), size)


def _native_views(image: Image.Image, rng: Generator, size: int, views: NDArray[np.uint8]) -> None:
    augment = Augmenter(size)
    views[0] = _square(image, size, rng)
    views[1] = _square(augment(_cut(image, _AUGMENTED_WINDOW * size, rng), rng), size, rng)
    # Of a whole photograph a global view would show no trace of anything: both are of a window that is about as much
    # larger than a view as the images of D³ are.
    window = _cut(image, int(_WHOLE_WINDOW * size), rng)
    for view, scale in zip(views[2:], (GLOBAL_SCALE, LOCAL_SCALE), strict=True):
        view[:] = _square(augment(_random_resized_crop(window, size, scale, rng), rng), size, rng)


def _random_resized_crop(image: Image.Image, size: int, scale: tuple[float, float], rng: Generator) -> Image.Image:
    """As torchvision's `RandomResizedCrop(size, scale)`, bicubic."""
    part = _reduced(image.crop(_random_box(image.size, scale, rng)), size)
    return Image.fromarray(_stretched(part, size, size))


def _random_box(sides: tuple[int, int], scale: tuple[float, float], rng: Generator) -> tuple[int, int, int, int]:
    width, height = sides
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return left, top, left + across, top + down
    # No such part of a strip: its middle, as near to the strip's form as is allowed.
    across, down = min(width, round(height * _ASPECTS[1])), min(height, round(width / _ASPECTS[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def _stretched_centre(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """As torchvision's `Resize(floor(size / 0.9))`, bicubic, and `CenterCrop(size)`; of a strip only the middle."""
    most = _LONGEST * min(image.size)
    if max(image.size) > most:
        spare_x, spare_y = max(0, image.width - most), max(0, image.height - most)
        left, top = spare_x // 2, spare_y // 2
        image = image.crop((left, top, left + image.width - spare_x, top + image.height - spare_y))
    shorter = math.floor(size / _CROP_PART)
    width, height = (shorter * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _stretched(image, width, height)[top : top + size, left : left + size]


def _stretched(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Bicubic with antialiasing; torch's kernel is Pillow's with vector instructions, two to four times as fast."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    stretched = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    result: NDArray[np.uint8] = stretched[0].permute(1, 2, 0).numpy()
    return result


def _reduced(image: Image.Image, size: int) -> Image.Image:
    """At a whole fraction, keeping twice the detail of a view: for views of 224 D³'s 512 pixels stay as they are."""
    factor = min(image.size) // (_DETAIL * size)
    return image.reduce(factor) if factor > 1 else image


def _square(image: Image.Image, size: int, rng: Generator) -> NDArray[np.uint8]:
    """A square from anywhere in the image, or all of it in the middle of black."""
    part = _cut(image, size, rng)
    left, top = (size - part.width) // 2, (size - part.height) // 2
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[top : top + part.height, left : left + part.width] = np.asarray(part)
    return pixels


def _cut(image: Image.Image, side: int, rng: Generator) -> Image.Image:
    """A square of this side from anywhere; along a shorter side all of it."""
    across, down = min(side, image.width), min(side, image.height)
    left, top = int(rng.integers(image.width - across + 1)), int(rng.integers(image.height - down + 1))
    return image.crop((left, top, left + across, top + down))
