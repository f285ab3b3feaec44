"""The centre of a JPEG beside all of it: `decode` on one thread, with the extension and as Pillow does it.

    python -m bench.decoding [--rounds 5] [--quick] [--json FILE]

Both read the same bytes in memory, and time is the thread's own, so that neighbours on the machine count little.
Ours is given the content hash, as the worker gives it, which hashes once per image beside this. Pillow's way is
`Image.open(…).convert("RGB")` and the centre of the result, which is what the published pipeline does; every pixel
must be equal, or the program fails.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.images import Kind, make_images
from bench.rounds import alternate, compared, print_table, rows_of, write_json
from code_worker.images.decode import decode
from code_worker.images.region import region_decoder
from code_worker.settings import LimitSettings

KINDS = {
    "640x480-jpeg": 2.2,
    "1920x1080-jpeg": 3.8,
    "4000x3000-jpeg": 9.0,
    "640x480-progressive": None,
    "1920x1080-progressive": None,
    "640x480-png": None,
    "1920x1080-png": None,
    "640x480-webp": None,
}
"""What is measured, with the bar where there is one."""
SECONDS = 1.0
TITLES = ("images", "decoder", "images/s", "ours is … times as fast", "bar")
_LIMITS = LimitSettings()
_HASH = "0" * 64


def ours(data: bytes) -> NDArray[np.uint8]:
    """What a worker does, limits and header facts included."""
    return decode(data, _LIMITS, sha256=_HASH)[0]


def pillow(data: bytes) -> NDArray[np.uint8]:
    """What the published pipeline does before its tensors."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top = (round((side - 224) / 2.0) for side in image.size)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def rate(decoder: Callable[[bytes], NDArray[np.uint8]], images: Sequence[bytes], seconds: float) -> float:
    """Images per second of this thread's time, for about so long."""
    began, done = time.thread_time(), 0
    while time.thread_time() - began < seconds:
        for data in images:
            decoder(data)
        done += len(images)
    return done / (time.thread_time() - began)


def compare(kind: Kind, images: Sequence[bytes], rounds: int, seconds: float, bar: float | None) -> dict[str, Any]:
    """Figures of both.

    Raises:
        SystemExit: a pixel differs.
    """
    differing = sum(int((ours(data) != pillow(data)).any(axis=2).sum()) for data in images)
    if differing:
        raise SystemExit(f"{kind}: {differing} pixels differ")
    decoders = {"ours": ours, "Pillow": pillow}
    rates = alternate(list(decoders), rounds, lambda name: rate(decoders[name], images, seconds))
    found = compared(rates, "ours", {} if bar is None else {"Pillow": bar})
    return {"images": len(images), "differing_pixels": differing, "rounds": rounds, "decoders": found}


def main() -> None:
    """Makes the images, runs the rounds, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the smallest kind, two short rounds")
    parser.add_argument("--directory", type=Path, help="keep the images here for the next time")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    kinds, rounds, seconds = (["640x480-jpeg"], 2, 0.2) if chosen.quick else (list(KINDS), chosen.rounds, SECONDS)
    print(f"extension: {region_decoder()[1]}")
    found: dict[str, Any] = {"extension": region_decoder()[1], "kinds": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for text in kinds:
            kind = Kind.parse(text)
            paths = make_images((chosen.directory or Path(temporary)) / text, kind, 12)
            images = [path.read_bytes() for path in paths]
            found["kinds"][text] = compare(kind, images, rounds, seconds, KINDS[text])
            print_table(TITLES, list(rows_of(text, found["kinds"][text]["decoders"])))
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
