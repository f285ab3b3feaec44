"""The images of the demonstration: photographs cut up, toy generators, and broken files of every kind."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.errors import ConfigurationError
from code_worker.images.decode import decode_crop
from code_worker.system.machine import usable_cores
from code_worker.types import IMAGE_SIZE, RejectReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from code_worker.settings import LimitSettings

    Simulation = Callable[[NDArray[np.uint8], Generator], NDArray[np.uint8]]


def _nearest(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Each pixel of a smaller picture repeated 2, 3 or 4 times."""
    factor = int(rng.integers(2, 5))
    small = _shrunk(pixels, factor)
    return _fitted(np.repeat(np.repeat(small, factor, axis=0), factor, axis=1), pixels.shape)


def _bilinear(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A smaller picture enlarged 2 to 4 times by linear interpolation: no detail is left."""
    from PIL import Image  # only the demonstration's images need it here

    height, width, _ = pixels.shape
    small = Image.fromarray(_shrunk(pixels, int(rng.integers(2, 5))))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def _checkerboard(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A transposed convolution whose kernel (3) is no multiple of its stride (2): pixels overlap unevenly."""
    # (h, w, 3) uint8 → (⌈h/2⌉, ⌈w/2⌉, 3) float64
    small = _shrunk(pixels, 2).astype(np.float64)
    # Sums to 1 over both phases; were the outer taps half the middle one, nothing would overlap unevenly.
    outer = rng.uniform(0.6, 0.7)
    kernel = np.array([outer, 1.5 - outer, outer])
    for axis in (0, 1):
        small = _transposed(small, kernel, axis)
    return _fitted(np.clip(np.rint(small), 0, 255).astype(np.uint8), pixels.shape)


def _transposed(values: NDArray[np.float64], kernel: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    moved = np.moveaxis(values, axis, 0)
    # (n, …) → (2n + 1, …): stride 2, kernel 3, without padding
    out = np.zeros((2 * len(moved) + 1, *moved.shape[1:]))
    for tap, weight in enumerate(kernel):
        out[tap : tap + 2 * len(moved) : 2] += weight * moved
    return np.moveaxis(out, 0, axis)


def _sharpened(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A smaller picture enlarged 2 to 3 times by Lanczos' kernel and sharpened, as upscalers do."""
    from PIL import Image, ImageFilter

    height, width, _ = pixels.shape
    factor = rng.uniform(2, 3)
    small = Image.fromarray(pixels).resize((round(width / factor), round(height / factor)), Image.Resampling.BOX)
    large = small.resize((width, height), Image.Resampling.LANCZOS)
    percent = int(rng.integers(80, 161))
    return np.asarray(large.filter(ImageFilter.UnsharpMask(radius=2, percent=percent, threshold=0)))


def _quantised(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Returns what differs from a blurred picture, quantised in blocks of 8×8.

    The residual of a learned codec or decoder.
    """
    from PIL import Image, ImageFilter

    image = Image.fromarray(pixels)
    smooth = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float64)
    step = rng.uniform(10, 20)
    coefficients = _in_blocks(pixels - smooth, _COSINES)
    residual = _in_blocks(np.rint(coefficients / step) * step, _COSINES.T)
    return np.asarray(np.clip(np.rint(smooth + residual), 0, 255), dtype=np.uint8)


def _in_blocks(values: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """`M·block·Mᵀ` for each whole 8×8 block of each channel; what is left at the edges becomes 0."""
    out = np.zeros_like(values)
    rows, columns = values.shape[0] // 8, values.shape[1] // 8
    # (8r, 8c, 3) → (r, 8, c, 8, 3): block row, row within, block column, column within, channel
    blocks = values[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8, 3)
    out[: rows * 8, : columns * 8] = np.einsum("ij,ajbkc,lk->aiblc", matrix, blocks, matrix).reshape(
        rows * 8, columns * 8, 3
    )
    return out


def _cosines() -> NDArray[np.float64]:
    """The orthonormal 8×8 DCT-II."""
    positions = np.arange(8)
    # (8, 8): row k is the wave of frequency k, column n its value at pixel n
    waves = np.cos(np.pi * (2 * positions[None] + 1) * positions[:, None] / 16) / 2
    waves[0] /= np.sqrt(2)
    return waves


def _woven(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """A faint weave of period 3 or 4, as a decoder leaves whose filters respond to their own grid."""
    height, width, _ = pixels.shape
    period, depth = int(rng.integers(3, 5)), rng.uniform(2.5, 5)
    rows, columns = np.mgrid[0:height, 0:width]
    # (h, w), the same for the three channels
    weave = depth * np.cos(2 * np.pi * rows / period) * np.cos(2 * np.pi * columns / period)
    return np.asarray(np.clip(np.rint(pixels + weave[..., None]), 0, 255), dtype=np.uint8)


def _dotted(pixels: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Faint dots, every other pixel brighter as on a chessboard: phases of a sub-pixel convolution that disagree.

    Aitken et al., "Checkerboard artifact free sub-pixel convolution" (arXiv 1707.02937).
    """
    height, width, _ = pixels.shape
    rows, columns = np.mgrid[0:height, 0:width]
    # (h, w) of ±d, the same for the three channels
    dots = rng.uniform(4, 8) * (1 - 2 * ((rows + columns) % 2))
    return np.asarray(np.clip(np.rint(pixels + dots[..., None]), 0, 255), dtype=np.uint8)


def _shrunk(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    from PIL import Image

    height, width, _ = pixels.shape
    size = (-(-width // factor), -(-height // factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _fitted(pixels: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels[: shape[0], : shape[1]])


_COSINES: Final = _cosines()

GENERATORS: Final[dict[str, Simulation]] = {
    "toy-nearest": _nearest,
    "toy-bilinear": _bilinear,
    "toy-checkerboard": _checkerboard,
    "toy-sharpened": _sharpened,
}
"""What the starter encoder was trained on."""

NEWCOMERS: Final[dict[str, Simulation]] = {
    "toy-woven": _woven,
    "toy-quantised": _quantised,
    "toy-dotted": _dotted,
}
"""What it has never seen."""

NEWCOMER: Final = "toy-dotted"
"""The one that appears in the second act; of the three it is learned soonest."""

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
