"""The demonstration's images: photographs that scikit-learn ships, cut up, and broken files of every kind."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.demo.generators import GENERATORS, NEWCOMER, NEWCOMERS
from code_worker.errors import ConfigurationError
from code_worker.images.decode import decode_crop
from code_worker.system.machine import usable_cores
from code_worker.types import IMAGE_SIZE, RejectReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from code_worker.demo.generators import Simulation
    from code_worker.settings import LimitSettings

_NAMES: Final = ("china.jpg", "flower.jpg")


class Photographs:
    """Crops of the photographs.

    Raises:
        ConfigurationError: scikit-learn is not installed, or came without its photographs.
    """

    def __init__(self) -> None:
        from PIL import Image  # only the demonstration's images need it here

        # Found, not imported: two files are wanted, and the import takes a second.
        spec = find_spec("sklearn")
        home = Path(spec.origin or "").parent / "datasets" / "images" if spec else Path()
        paths = [home / name for name in _NAMES]
        if not all(path.is_file() for path in paths):
            raise ConfigurationError(
                "the demo cuts its images from scikit-learn's photographs: pip install scikit-learn"
            )
        self._pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths]

    def crop(self, rng: Generator) -> NDArray[np.uint8]:
        """A `(height, width, 3) uint8` piece of one photograph, 232 to 427 pixels high and wide, perhaps mirrored."""
        whole = self._pixels[rng.integers(len(self._pixels))]
        height, width = (int(rng.integers(232, side + 1)) for side in (whole.shape[0], min(whole.shape[1], 427)))
        top = int(rng.integers(whole.shape[0] - height + 1))
        left = int(rng.integers(whole.shape[1] - width + 1))
        piece = whole[top : top + height, left : left + width]
        return np.ascontiguousarray(piece[:, ::-1] if rng.random() < 0.5 else piece)


REAL: Final = "real"
_TRAINING_SEED: Final = 1
_JUDGED_SEED: Final = 2
_NEWCOMER_SEED: Final = 6
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


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """An image that is no file yet."""

    name: str
    source: str
    pixels: NDArray[np.uint8]
    form: str


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
    """`count` images, every other one real, the rest by each known toy generator in turn."""
    return _as_files(_mixed(count, GENERATORS, _JUDGED_SEED))


def newcomer_pictures(count: int) -> Iterator[Picture]:
    """`count` others, every other one real, the rest by a toy generator that nothing was taught of."""
    return _as_files(_mixed(count, {NEWCOMER: NEWCOMERS[NEWCOMER]}, _NEWCOMER_SEED, prefix="later-"))


def _mixed(count: int, generators: Mapping[str, Simulation], seed: int, *, prefix: str = "") -> Iterator[_Drawn]:
    """Formats do not tell which is which."""
    photographs, rng, names = Photographs(), np.random.default_rng(seed), list(generators)
    for number in range(count):
        source = REAL if number % 2 == 0 else names[number // 2 % len(names)]
        crop = photographs.crop(rng)
        pixels = crop if source == REAL else generators[source](crop, rng)
        form, suffix = _FORMATS[rng.integers(len(_FORMATS))]
        yield _Drawn(f"{prefix}{source}-{number:04}.{suffix}", source, pixels, form)


def training_pictures(pairs: int) -> Iterator[Picture]:
    """Other cuts than those that are judged, each real and then as one of the known toy generators makes it.

    Of the same two photographs all the same: what is learned here is to tell a trace from its absence.
    """
    return _as_files(_pairs(pairs))


def _pairs(count: int) -> Iterator[_Drawn]:
    photographs, rng, names = Photographs(), np.random.default_rng(_TRAINING_SEED), list(GENERATORS)
    for number in range(count):
        crop = photographs.crop(rng)
        name = names[number % len(names)]
        form, suffix = _FORMATS[rng.integers(len(_FORMATS))]
        for source, pixels in ((REAL, crop), (name, GENERATORS[name](crop, rng))):
            yield _Drawn(f"learned-{source}-{number:04}.{suffix}", source, pixels, form)


def _as_files(drawn: Iterable[_Drawn]) -> Iterator[Picture]:
    """Encoded on all cores: Pillow lets other threads run meanwhile, and PNG and WebP take most of the time."""
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="encode") as pool:
        yield from pool.map(lambda each: Picture(each.name, each.source, _encoded(each.pixels, each.form)), drawn)


def crops_of(some: Sequence[Picture], limits: LimitSettings) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """`(n, 224, 224, 3) uint8` and labels `(n,) int8`, 0 real, 1 generated."""
    crops = np.empty((len(some), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for row, picture in enumerate(some):
        crops[row] = decode_crop(picture.data, limits)
    return crops, np.array([picture.source != REAL for picture in some], np.int8)


def _encoded(pixels: NDArray[np.uint8], form: str) -> bytes:
    from PIL import Image  # only the demonstration writes images

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
