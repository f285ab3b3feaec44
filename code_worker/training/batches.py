"""Batches of views, prepared ahead of the step that wants them: by threads, or by processes where there are cores."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from code_worker.errors import ImageRejectedError, TrainingError
from code_worker.images.decode import decode_whole
from code_worker.machine import usable_cores
from code_worker.training.objective import VIEWS
from code_worker.training.sampling import RecordSampler, generator_of_step
from code_worker.training.views import ViewSettings, record_views

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray
    from PIL import Image

    from code_worker.settings import LimitSettings
    from code_worker.training.job import Item

__all__ = ["BatchMaker", "ImageCache", "batches"]

_CACHE_BYTES: Final = 256 * 2**20
_AHEAD: Final = 3
_TRIES: Final = 64


class ImageCache:
    """Decoded images by position, the least used dropped first; safe to share between threads."""

    def __init__(self, items: Sequence[Item], limits: LimitSettings, *, max_bytes: int = _CACHE_BYTES) -> None:
        self._items = items
        self._limits = limits
        self._max_bytes = max_bytes
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
        batch = np.empty((self._records, len(VIEWS), size, size, 3), np.uint8)
        rng = generator_of_step(self._seed, step, self._rank)
        for row in range(self._records):
            batch[row] = self._record(rng)
        return torch.from_numpy(batch)

    def _record(self, rng: Generator) -> NDArray[np.uint8]:
        for _ in range(_TRIES):
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
