"""Batches of views: which images a step learns from, their eight views, and how both are prepared ahead."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from code_worker.errors import ImageRejectedError, TrainingError
from code_worker.images.decode import decode_whole
from code_worker.system.machine import usable_cores
from code_worker.training.fitting.augment import Augmenter
from code_worker.training.fitting.objective import VIEWS
from code_worker.types import IMAGE_SIZE

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    from code_worker.settings import LimitSettings
    from code_worker.training.fitting.job import Item

GLOBAL_SCALE: Final = (0.4, 1.0)
LOCAL_SCALE: Final = (0.05, 0.4)
"""Part of the image's area that a global or local view shows."""

_CROP_PART = 0.9
_ASPECTS = (3 / 4, 4 / 3)
_CROP_TRIES = 10
_DETAIL = 2
_LONGEST = 4
_AUGMENTED_WINDOW = 2
_WHOLE_WINDOW = 1.5


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """Settings of the views.

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
    # (class, view, row, column, channel)
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
        # Published order: crop, then augment, then stretch to the view.
        view[:] = _stretched_centre(augment(_random_resized_crop(image, size, scale, rng), rng), size)


def _native_views(image: Image.Image, rng: Generator, size: int, views: NDArray[np.uint8]) -> None:
    augment = Augmenter(size)
    views[0] = _square(image, size, rng)
    # Cut before the augmentation: it costs by area, and a photograph has a hundred times that of a view.
    views[1] = _square(augment(_cut(image, _AUGMENTED_WINDOW * size, rng), rng), size, rng)
    # Of a whole photograph a global view would show no trace of anything: both are of a window that is about as much
    # larger than a view as the images of D³ are.
    window = _cut(image, int(_WHOLE_WINDOW * size), rng)
    for view, scale in zip(views[2:], (GLOBAL_SCALE, LOCAL_SCALE), strict=True):
        view[:] = _square(augment(_random_resized_crop(window, size, scale, rng), rng), size, rng)


def _random_resized_crop(image: Image.Image, size: int, scale: tuple[float, float], rng: Generator) -> Image.Image:
    """Crops like torchvision's `RandomResizedCrop(size, scale)`, bicubic."""
    part = _reduced(image.crop(_random_box(image.size, scale, rng)), size)
    return Image.fromarray(_stretched(part, size, size))


def _random_box(sides: tuple[int, int], scale: tuple[float, float], rng: Generator) -> tuple[int, int, int, int]:
    width, height = sides
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    for _ in range(_CROP_TRIES):
        # Both drawn at every try, as torchvision does: the distribution of what is taken depends on it.
        area = width * height * rng.uniform(*scale)
        # By the logarithm, so that wide and tall are equally likely.
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
    """Crops like torchvision's `Resize(floor(size / 0.9))`, bicubic, and `CenterCrop(size)`.

    A strip in its middle.
    """
    most = _LONGEST * min(image.size)
    if max(image.size) > most:
        spare_x, spare_y = max(0, image.width - most), max(0, image.height - most)
        left, top = spare_x // 2, spare_y // 2
        image = image.crop((left, top, left + image.width - spare_x, top + image.height - spare_y))
    # 248 for views of 224, as the published training resizes.
    shorter = math.floor(size / _CROP_PART)
    width, height = (shorter * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _stretched(image, width, height)[top : top + size, left : left + size]


def _stretched(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Bicubic with antialiasing; torch's kernel is Pillow's with vector instructions, two to four times as fast."""
    # (height, width, 3) → (1, 3, height, width) uint8
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
    # Black around what is too small, as inference pads.
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[top : top + part.height, left : left + part.width] = np.asarray(part)
    return pixels


def _cut(image: Image.Image, side: int, rng: Generator) -> Image.Image:
    """A square of this side from anywhere; along a shorter side all of it."""
    across, down = min(side, image.width), min(side, image.height)
    left, top = int(rng.integers(image.width - across + 1)), int(rng.integers(image.height - down + 1))
    return image.crop((left, top, left + across, top + down))


T = TypeVar("T")


def generator_of_step(seed: int, step: int, rank: int = 0) -> Generator:
    """The random numbers of one process in one step; no other step or process has the same."""
    return np.random.default_rng((seed, step, rank))


class RecordSampler:
    """Draws records: one real image and one generated one.

    Every generator is drawn equally often, however many images it has; `new_share` of the generated images are of
    what the champion never learned, and half as many of the real ones. A generated image comes with a real one of its
    group (the photograph that it was made from, another image of the same post), as in D³; where its group has none
    the two are drawn apart, which the objective does not mind: its negatives are unpaired.

    Raises:
        TrainingError: no real or no generated image.
    """

    def __init__(self, items: Sequence[Item], *, new_share: float) -> None:
        reals = [number for number, item in enumerate(items) if item.label == 0]
        fakes = [number for number, item in enumerate(items) if item.label == 1]
        if not reals or not fakes:
            raise TrainingError(
                f"{len(reals)} real and {len(fakes)} generated images to learn from: both kinds are needed"
            )
        self._groups = [item.group for item in items]
        self._siblings: dict[str | None, list[int]] = {}
        for number in reals:
            self._siblings.setdefault(items[number].group, []).append(number)
        self._old_reals = [number for number in reals if not items[number].new]
        self._new_reals = [number for number in reals if items[number].new]
        self._old = _by_generator(items, [number for number in fakes if not items[number].new])
        self._new = _by_generator(items, [number for number in fakes if items[number].new])
        self._new_share = new_share

    def draw(self, rng: Generator, records: int) -> list[tuple[int, int]]:
        """Positions of a real and a generated image for each of `records` records."""
        return [self._record(rng) for _ in range(records)]

    def _record(self, rng: Generator) -> tuple[int, int]:
        fakes = self._old_or_new(rng, self._old, self._new, self._new_share)
        # A generator first, then one of its images: each generator is as likely as any other.
        fake = _one_of(rng, _one_of(rng, fakes))
        group = self._groups[fake]
        # Real and generated image of one subject: what is left to tell them apart is the trace of the generator.
        if group is not None and group in self._siblings:
            return _one_of(rng, self._siblings[group]), fake
        return _one_of(rng, self._old_or_new(rng, self._old_reals, self._new_reals, self._new_share / 2)), fake

    @staticmethod
    def _old_or_new(rng: Generator, old: Sequence[T], new: Sequence[T], share: float) -> Sequence[T]:
        # Drawn in any case: what there is must not shift the numbers that follow.
        wants_new = rng.random() < share
        return new if new and (wants_new or not old) else old


def _one_of(rng: Generator, members: Sequence[T]) -> T:
    return members[int(rng.integers(len(members)))]


def _by_generator(items: Sequence[Item], numbers: Sequence[int]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for number in numbers:
        found.setdefault(items[number].generator or "", []).append(number)
    return [found[name] for name in sorted(found)]


_CACHE_BYTES: Final = 256 * 2**20
_AHEAD: Final = 3
_READ_TRIES: Final = 64


class ImageCache:
    """Decoded images by position, the least used dropped first; safe to share between threads."""

    def __init__(self, items: Sequence[Item], limits: LimitSettings, *, max_bytes: int = _CACHE_BYTES) -> None:
        self._items = items
        self._limits = limits
        self._max_bytes = max_bytes
        # An LRU of bytes in six lines, with its own lock: no dependency for it.
        self._kept: OrderedDict[int, Image.Image] = OrderedDict()
        self._bytes = 0
        self._broken: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def broken(self) -> dict[str, str]:
        """Path and reason of every image that could not be decoded so far."""
        with self._lock:
            return {self._items[number].path: reason for number, reason in self._broken.items()}

    def image(self, number: int) -> Image.Image | None:
        """The whole image as RGB; None if it cannot be decoded."""
        with self._lock:
            if number in self._broken:
                return None
            if (image := self._kept.get(number)) is not None:
                self._kept.move_to_end(number)
                return image
        try:
            # Outside of the lock: two threads may decode the same image, and decoding is what takes the time.
            image = decode_whole(Path(self._items[number].path).read_bytes(), self._limits)
        except (ImageRejectedError, OSError) as error:
            with self._lock:
                self._broken[number] = str(error)
            return None
        self._keep(number, image)
        return image

    def _keep(self, number: int, image: Image.Image) -> None:
        size = _bytes_of(image)
        with self._lock:
            # One that is larger than the whole cache would empty it for nothing.
            if number not in self._kept and size <= self._max_bytes:
                self._kept[number] = image
                self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= _bytes_of(self._kept.popitem(last=False)[1])

    def __getstate__(self) -> dict[str, Any]:
        """For a loader process: what to decode, none of what was."""
        return {"items": self._items, "limits": self._limits, "max_bytes": self._max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["items"], state["limits"], max_bytes=state["max_bytes"])  # type: ignore[misc]  # same class


def _bytes_of(image: Image.Image) -> int:
    # Pillow keeps four bytes for a pixel of three.
    return 4 * image.width * image.height


class BatchMaker:
    """A step's views, as a function of the step: `make(step)` is `(records, 8, size, size, 3) uint8`."""

    def __init__(
        self, cache: ImageCache, sampler: RecordSampler, views: ViewSettings, *, records: int, seed: int, rank: int
    ) -> None:
        self._cache = cache
        self._sampler = sampler
        self._views = views
        self._records = records
        self._seed = seed
        self._rank = rank

    def make(self, step: int) -> Tensor:
        """Views of a step's records, in the order of `objective.VIEWS`.

        Raises:
            TrainingError: no record could be decoded in many tries.
        """
        size = self._views.size
        # (records, 8, size, size, 3) uint8: 39 MB for 32 records of 224.
        batch = np.empty((self._records, len(VIEWS), size, size, 3), np.uint8)
        # From seed, step and rank alone: which process of the loader makes a batch, or whether a run was resumed,
        # changes nothing.
        rng = generator_of_step(self._seed, step, self._rank)
        for row in range(self._records):
            batch[row] = self._record(rng)
        return torch.from_numpy(batch)

    def _record(self, rng: Generator) -> NDArray[np.uint8]:
        for _ in range(_READ_TRIES):
            ((real, fake),) = self._sampler.draw(rng, 1)
            images = self._cache.image(real), self._cache.image(fake)
            if images[0] is not None and images[1] is not None:
                return record_views(images[0], images[1], rng, self._views)
        broken = next(iter(self._cache.broken.items()), ("", ""))
        raise TrainingError(f"no record can be decoded; for one, {broken[0]}: {broken[1]}")

    # What torch's DataLoader calls: a dataset whose samples are whole batches, by step.
    __getitem__ = make


def batches(maker: BatchMaker, steps: range, *, processes: int = 0, pin: bool = False) -> Iterator[Tensor]:
    """The batches of these steps in order, a few of them always under way.

    Args:
        maker: what prepares a step.
        steps: which steps.
        processes: loader processes; 0 for threads of this one, which suits few cores and small images.
        pin: put them into page-locked memory, for a CUDA device.
    """
    if processes:
        loader: Any = torch.utils.data.DataLoader(
            maker,  # type: ignore[arg-type]  # all that a sampler asks of a dataset is to be indexed
            batch_size=None,
            sampler=steps,
            num_workers=processes,
            prefetch_factor=2,
            pin_memory=pin,
            # A fork would take threads' locks and a CUDA context along.
            multiprocessing_context="spawn",
        )
        yield from loader
        return
    with ThreadPoolExecutor(max_workers=min(2, usable_cores()), thread_name_prefix="views") as pool:
        waiting: deque[Future[Tensor]] = deque()
        for step in steps:
            waiting.append(pool.submit(maker.make, step))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
