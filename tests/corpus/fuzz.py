"""Good files changed at random, for a time: `python -m tests.corpus.fuzz whole|region --seed 1 --seconds 20`.

Prints what became of them. A process of its own, so that a crash of a decoder is seen as one; an error without a type
ends it with the number of the file, which the same seed makes again (`--only NUMBER`).
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from code_worker.errors import ImageRejectedError
from code_worker.images.decode import decode_crop
from code_worker.images.region import region_decoder
from code_worker.settings import LimitSettings
from tests.corpus.damage import flipped
from tests.corpus.pictures import pictures
from tests.image_files import encoded, pixels

LARGEST = 200_000
"""Larger files are no better to change, and slower."""
ODD = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
)

Judge = Callable[[bytes, random.Random], str]


def overwritten(data: bytes, source: random.Random) -> bytes:
    """Somewhere, often in the header, bytes that mean the most or the least."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 3, 10))):
        at, value = source.randrange(min(len(changed), source.choice((64, 700, len(changed))))), source.choice(ODD)
        changed[at : at + len(value)] = value
    return bytes(changed)


def spliced(data: bytes, other: bytes, source: random.Random) -> bytes:
    """The beginning of one file and the end of another."""
    return data[: source.randrange(1, len(data))] + other[source.randrange(len(other)) :]


def inserted(data: bytes, source: random.Random) -> bytes:
    """Bytes of its own, or any, put in once more."""
    at, size = source.randrange(len(data)), source.choice((1, 4, 64, 3000))
    start = source.randrange(len(data))
    more = data[start : start + size] if source.random() < 0.5 else source.randbytes(size)
    return data[:at] + more + data[at:]


def shortened(data: bytes, source: random.Random) -> bytes:
    """Cut off, or with a piece missing."""
    at = source.randrange(1, len(data))
    return data[:at] if source.random() < 0.5 else data[:at] + data[at + source.randrange(1, 3000) :]


def changed(files: Sequence[bytes], source: random.Random) -> bytes:
    """One of the files, changed in up to three ways."""
    data = source.choice(files)
    for _ in range(source.choice((1, 1, 2, 3))):
        if len(data) < 32:
            return data
        match source.randrange(5):
            case 0:
                data = flipped(data, source.choice((1, 5, 30)), source)
            case 1:
                data = overwritten(data, source)
            case 2:
                data = spliced(data, source.choice(files), source)
            case 3:
                data = inserted(data, source)
            case _:
                data = shortened(data, source)
    return data


def judge_whole(data: bytes, _: random.Random) -> str:
    """As a worker decodes it."""
    try:
        crop = decode_crop(data, LimitSettings())
    except ImageRejectedError as error:
        return error.reason.value
    assert crop.shape == (224, 224, 3)
    return "judged"


def judge_region(data: bytes, source: random.Random) -> str:
    """Any region of it, by the extension alone."""
    assert region_decoder()[0], "the extension is not installed"
    from code_worker_jpeg import decode_region

    left, top = source.choice((0, 1, 37, 300, 65_500)), source.choice((0, 1, 37, 300, 65_500))
    width, height = source.choice((1, 8, 224, 400)), source.choice((1, 8, 224, 400))
    found = decode_region(data, left, top, width, height)
    assert found is None or len(found) == width * height * 3
    return "declined" if found is None else "decoded"


def jpegs() -> list[bytes]:
    """Of every sampling and order that the extension takes, and some that it does not."""
    picture = pixels(400, 330)
    options = [{"subsampling": number, "progressive": order} for number in range(3) for order in (False, True)]
    files = [encoded(picture, "JPEG", **each) for each in [*options, {"restart_marker_blocks": 3}]]
    return [*files, encoded(picture.convert("L"), "JPEG"), encoded(picture.convert("CMYK"), "JPEG")]


def run(files: Sequence[bytes], judge: Judge, seed: int, seconds: float) -> dict[str, object]:
    """Judges changed files until so much processor time is used."""
    ends: Counter[str] = Counter()
    slowest_s, number, until = 0.0, 0, time.process_time() + seconds
    while time.process_time() < until:
        data, source = made(files, seed, number)
        began = time.thread_time()
        try:
            ends[judge(data, source)] += 1
        except BaseException:
            print(f"file {number} of seed {seed}", flush=True)
            raise
        slowest_s = max(slowest_s, time.thread_time() - began)
        number += 1
    return {"files": number, "slowest_s": slowest_s, "ends": dict(ends.most_common())}


def made(files: Sequence[bytes], seed: int, number: int) -> tuple[bytes, random.Random]:
    """The file of that number, whatever came before it."""
    source = random.Random(f"{seed} {number}")
    return changed(files, source), source


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("whole", "region"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    judge = judge_whole if options.what == "whole" else judge_region
    files = jpegs()
    if options.what == "whole":
        files += [data for data in pictures().values() if len(data) < LARGEST]
    if options.only is not None:
        print(judge(*made(files, options.seed, options.only)))
        return
    print(json.dumps(run(files, judge, options.seed, options.seconds)))


if __name__ == "__main__":
    main()
