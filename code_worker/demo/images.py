"""The demonstration's images: labelled ones in several formats, and broken ones of every kind."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.demo.artefacts import GENERATORS
from code_worker.demo.photographs import Photographs
from code_worker.images.decode import decode
from code_worker.types import IMAGE_SIZE, RejectReason

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    from code_worker.settings import LimitSettings

__all__ = ["REAL", "Broken", "Picture", "broken_pictures", "pictures", "training_crops"]

REAL: Final = "real"
_TRAINING_SEED: Final = 1
_JUDGED_SEED: Final = 2
_FORMATS: Final = (
    ("JPEG", "jpg"),
    ("JPEG", "jpg"),
    ("PNG", "png"),
    ("WEBP", "webp"),
    ("TIFF", "tif"),
    ("BMP", "bmp"),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file and what it is: `source` is `real` or the name of a toy generator."""

    name: str
    source: str
    data: bytes

    @property
    def sha256(self) -> str:
        """Content hash, to compare with the verdict's."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class Broken:
    """Something that cannot be judged: its file (None: nothing is there) and the reason that must be given."""

    name: str
    data: bytes | None
    reason: RejectReason
    in_s3: bool = True
    allowed: bool = True
    source: str = "broken"


def pictures(count: int) -> Iterator[Picture]:
    """`count` images, every other one real, the rest by each toy generator in turn; formats do not tell which."""
    photographs, rng = Photographs(), np.random.default_rng(_JUDGED_SEED)
    for number in range(count):
        source = REAL if number % 2 == 0 else list(GENERATORS)[number // 2 % len(GENERATORS)]
        crop = photographs.crop(rng)
        pixels = crop if source == REAL else GENERATORS[source](crop, rng)
        form, suffix = _FORMATS[rng.integers(len(_FORMATS))]
        yield Picture(f"{source}-{number:04}.{suffix}", source, _encoded(pixels, form))


def training_crops(pairs: int, limits: LimitSettings) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """`(2 · pairs, 224, 224, 3) uint8` and labels `int8`: other cuts than `pictures`, each real and "generated".

    Of the same two photographs all the same: what a head learns here is to tell a trace from its absence.
    """
    photographs, rng = Photographs(), np.random.default_rng(_TRAINING_SEED)
    crops = np.empty((2 * pairs, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for number in range(pairs):
        crop = photographs.crop(rng)
        simulate = GENERATORS[list(GENERATORS)[number % len(GENERATORS)]]
        form, _ = _FORMATS[rng.integers(len(_FORMATS))]
        for row, pixels in enumerate((crop, simulate(crop, rng)), 2 * number):
            crops[row], _ = decode(_encoded(pixels, form), limits)
    return crops, np.tile(np.array([0, 1], np.int8), pairs)


def _encoded(pixels: NDArray[np.uint8], form: str) -> bytes:
    from PIL import Image  # noqa: PLC0415 - only the demonstration writes images

    out = io.BytesIO()
    options = {"JPEG": {"quality": 92}, "WEBP": {"quality": 92}}.get(form, {})
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def broken_pictures() -> list[Broken]:
    """One of each kind of thing that a moderation queue holds beside images."""
    whole = _encoded(_noise(np.random.default_rng(0)), "JPEG")
    return [
        Broken("cut-short.jpg", whole[: len(whole) // 2], RejectReason.TRUNCATED),
        Broken("cut-short-too.jpg", whole[: len(whole) - 40], RejectReason.TRUNCATED, in_s3=False),
        Broken("a-letter.jpg", b"Dear Sir or Madam,\n" * 40, RejectReason.UNSUPPORTED_FORMAT),
        Broken(
            "drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', RejectReason.UNSUPPORTED_FORMAT, in_s3=False
        ),
        Broken("bomb.png", _png_header(20_000, 20_000), RejectReason.TOO_MANY_PIXELS),
        Broken("nothing.jpg", b"", RejectReason.EMPTY),
        Broken("nothing-either.png", b"", RejectReason.EMPTY, in_s3=False),
        Broken("deleted-meanwhile.jpg", None, RejectReason.NOT_FOUND),
        Broken("never-was.jpg", None, RejectReason.NOT_FOUND, in_s3=False),
        Broken("somebody-elses.jpg", whole, RejectReason.SOURCE_NOT_ALLOWED, allowed=False),
        Broken("outside.jpg", whole, RejectReason.SOURCE_NOT_ALLOWED, in_s3=False, allowed=False),
    ]


def _noise(rng: Generator) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)


def _png_header(width: int, height: int) -> bytes:
    """A PNG that announces more pixels than it may have, and few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
