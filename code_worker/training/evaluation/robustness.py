"""Groups of images and robustness presets: the slices and conditions that figures are given for."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

from code_worker.data.datasets.examples import FAKE, REAL, UNNAMED
from code_worker.errors import ConfigurationError
from code_worker.images.decode import centre, decode_whole
from code_worker.training.fitting.augment import AUGMENTATIONS
from code_worker.types import IMAGE_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.datasets.examples import Example
    from code_worker.settings import LimitSettings

"""Stands for generated images of which nobody says what made them, and real ones of no collection."""


@dataclass(frozen=True, slots=True)
class Group:
    """Some of the images.

    Attributes:
        kind: `overall`; `generator`: its images and all reals; `collection`: what came from one source of reals,
            generated or not; `variant`: what the data set itself calls so.
        name: of the generator, collection or variant; `all` overall.
        members: `(n,) bool`.
    """

    kind: str
    name: str
    members: NDArray[np.bool_]


def labels_of(examples: Sequence[Example]) -> NDArray[np.int8]:
    """`(n,) int8`."""
    return np.array([one.label for one in examples], np.int8)


def group_images(examples: Sequence[Example]) -> list[Group]:
    """Overall first, then generators, collections and variants, each by name; variants only where there are some."""
    labels = labels_of(examples)
    generators = _named([one.generator if one.label == FAKE else "" for one in examples])
    collections = _named([one.collection for one in examples])
    found = [Group("overall", "all", np.ones(len(labels), np.bool_))]
    found += (
        Group("generator", name, (labels == REAL) | (generators == name))
        for name in _distinct(generators[labels == FAKE])
    )
    found += (Group("collection", name, collections == name) for name in _distinct(collections[labels == REAL]))
    if any(one.variant is not None for one in examples):
        variants = _named([one.variant for one in examples])
        found += [Group("variant", name, variants == name) for name in _distinct(variants)]
    return found


def _named(names: Sequence[str | None]) -> NDArray[np.object_]:
    return np.array([UNNAMED if name is None else name for name in names], object)


def _distinct(names: NDArray[np.object_]) -> list[str]:
    return sorted(set(names.tolist()))


Transform = Callable[[Image.Image, bytes], Image.Image]
"""(whole RGB image, the file's bytes, which decide what is random) → image."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Under what a set of images is judged.

    Attributes:
        key: its name in reports, such as `jpeg_50`.
        transform: what is done to the whole image before it is cropped; None: nothing.
        variant: only the images that the data set itself names so; None: all.
    """

    key: str
    transform: Transform | None = None
    variant: str | None = None


def _recompressed(image: Image.Image, _: bytes, *, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def _blurred(image: Image.Image, _: bytes, *, sigma: float) -> Image.Image:
    from scipy.ndimage import gaussian_filter  # takes a second, for other presets alone

    # On uint8, as SIDBench has it: each of the two passes drops what is behind the point.
    return Image.fromarray(gaussian_filter(np.asarray(image), sigma=(sigma, sigma, 0)))


def _shrunk(image: Image.Image, _: bytes, *, longest: int) -> Image.Image:
    factor = longest / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _augmented(image: Image.Image, data: bytes) -> Image.Image:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(data).digest()[:8], "big"))
    chosen = AUGMENTATIONS[int(rng.integers(len(AUGMENTATIONS)))]
    return chosen.apply(image, float(rng.uniform(*chosen.limits(IMAGE_SIZE))), rng)


def _in_turn(image: Image.Image, data: bytes, *, steps: Sequence[Transform]) -> Image.Image:
    for step in steps:
        image = step(image, data)
    return image


def _jpeg(quality: int) -> Transform:
    return partial(_recompressed, quality=quality)


def _blur(sigma: float) -> Transform:
    return partial(_blurred, sigma=sigma)


def _delivered(longest: int, quality: int) -> Condition:
    steps = (partial(_shrunk, longest=longest), _jpeg(quality))
    return Condition(f"{longest}px_q{quality}", partial(_in_turn, steps=steps))


CLEAN: Final = Condition("clean")
PRESETS: Final[dict[str, tuple[Condition, ...]]] = {
    "clean": (CLEAN,),
    "d3": (Condition("no_augm"), Condition("augm", _augmented)),
    "sidbench": (
        CLEAN,
        *(Condition(f"jpeg_{quality}", _jpeg(quality)) for quality in (95, 90, 50, 30)),
        *(Condition(f"blur_{sigma}", _blur(sigma)) for sigma in (2, 4)),
        Condition("blur_2_jpeg_50", partial(_in_turn, steps=(_blur(2), _jpeg(50)))),
    ),
    "delivery": (CLEAN, _delivered(768, 60), _delivered(512, 40)),
}


def conditions(presets: Sequence[str], variants: Collection[str] = ()) -> tuple[Condition, ...]:
    """The conditions of these presets, each once, in order.

    Args:
        presets: names in `PRESETS`.
        variants: those that the data set has of its own.

    Raises:
        ConfigurationError: an unknown preset, or none.
    """
    if unknown := [name for name in presets if name not in PRESETS]:
        raise ConfigurationError(f"unknown preset {unknown[0]!r}; known: {', '.join(sorted(PRESETS))}")
    if not presets:
        raise ConfigurationError(f"no preset: name one of {', '.join(sorted(PRESETS))}")
    found = {one.key: one for name in presets for one in _of(name, variants)}
    return tuple(found.values())


def _of(preset: str, variants: Collection[str]) -> tuple[Condition, ...]:
    if preset == "d3" and variants:
        # What the data set left as it is comes first: pages draw their curves of the first condition.
        return tuple(
            Condition(name, variant=name) for name in sorted(variants, key=lambda name: (name == "augm", name))
        )
    return PRESETS[preset]


def make_crop(transform: Transform, limits: LimitSettings) -> Callable[[bytes], NDArray[np.uint8]]:
    """Returns a function from a file to the crop under a transform; it raises ImageRejectedError like `decode`."""
    return lambda data: centre(transform(decode_whole(data, limits), data))
