"""Image files of every format and mode the published transform meets, from shipped photographs and seeded noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

_EXIF_ORIENTATION = 274


def write_images(directory: Path, seed: int) -> dict[str, Path]:
    """Writes about thirty files, 100×80 to 1920×1080; returns path by file name, sorted by name."""
    rng = np.random.default_rng(seed)
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    for name, save in {**_jpegs(china, flower, rng), **_pngs(china, flower, rng), **_others(china, flower)}.items():
        save(directory / name)
    return {path.name: path for path in sorted(directory.iterdir())}


Writers = dict[str, Callable[[Path], None]]


def _saver(image: Image.Image, **options: object) -> Callable[[Path], None]:
    return lambda path: image.save(path, **options)


def _noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colour fields with fine grain: compressible, yet different in every patch."""
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height))
    grain = rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, np.int16) + grain, 0, 255).astype(np.uint8))


def _jpegs(china: Image.Image, flower: Image.Image, rng: np.random.Generator) -> Writers:
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6
    return {
        "base_640x427.jpg": _saver(china, quality=90),
        "big_1920x1080.jpg": _saver(flower.resize((1920, 1080), Image.Resampling.BICUBIC), quality=85),
        "noise_800x600.jpg": _saver(_noise(rng, 800, 600), quality=75),
        "prog_641x427.jpg": _saver(china.resize((641, 427)), progressive=True),
        "sub422_801x603.jpg": _saver(flower.resize((801, 603)), subsampling=1),
        "sub444_333x517.jpg": _saver(china.resize((333, 517)), subsampling=0),
        "odd_225x225.jpg": _saver(flower.resize((225, 225))),
        "thin_1000x37.jpg": _saver(_noise(rng, 1000, 37)),
        "tall_223x900.jpg": _saver(_noise(rng, 223, 900)),
        "gray.jpg": _saver(china.convert("L")),
        "cmyk.jpg": _saver(flower.convert("CMYK")),
        "exif6.jpg": _saver(china, exif=exif),
    }


def _pngs(china: Image.Image, flower: Image.Image, rng: np.random.Generator) -> Writers:
    rgba = flower.convert("RGBA")
    rgba.putalpha(china.convert("L"))
    deep = Image.fromarray((rng.random((300, 310)) * 400).astype(np.uint16))
    palette = china.quantize(64)
    return {
        "small_100x80.png": _saver(_noise(rng, 100, 80)),
        "exact_224.png": _saver(_noise(rng, 224, 224)),
        "even_226x230.png": _saver(flower.resize((226, 230))),
        "black_300x300.png": _saver(Image.new("RGB", (300, 300))),
        "white_300x300.png": _saver(Image.new("RGB", (300, 300), "white")),
        "rgba.png": _saver(rgba),
        "la.png": _saver(rgba.convert("LA")),
        "one_bit.png": _saver(china.convert("1")),
        "gray16.png": _saver(deep),
        "palette.png": _saver(palette),
        "pal_trans.png": _saver(palette, transparency=3),
    }


def _others(china: Image.Image, flower: Image.Image) -> Writers:
    frames = [china.rotate(15 * turn).quantize(32) for turn in range(3)]
    return {
        "palette.gif": _saver(flower.quantize(128)),
        "anim.gif": _saver(frames[0], save_all=True, append_images=frames[1:], duration=80),
        "odd_227x231.bmp": _saver(china.resize((227, 231))),
        "lzw.tiff": _saver(flower, compression="tiff_lzw"),
        "plain.tif": _saver(china),
        "lossy.webp": _saver(china, quality=80),
        "lossless.webp": _saver(flower.resize((400, 300)), lossless=True),
    }
