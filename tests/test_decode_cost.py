"""Decoding takes no more memory and no more steps than it may, and says so when the machine has no more of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from code_worker.errors import ImageRejectedError
from code_worker.images import decode as decoding
from code_worker.images.decode import decode, decode_crop
from code_worker.images.memory import _MemoryBudget, pillow_bytes, reserved_memory
from code_worker.images.readers import ImageBytes, kind_of, open_image
from code_worker.settings import LimitSettings
from code_worker.types import RejectReason
from tests.corpus.bombs import _scans
from tests.image_files import encoded, pixels, tiff
from tests.patience import polls
from tests.test_decode import reference

ROOT = Path(__file__).resolve().parents[1]
LIMITS = LimitSettings()


def eventually(condition: Callable[[], bool]) -> None:
    assert any(condition() for _ in polls(every_s=0.001))


def test_a_crop_alone_is_the_one_that_comes_with_facts() -> None:
    data = encoded(pixels(300, 260), "PNG")
    np.testing.assert_array_equal(decode_crop(data, LIMITS), decode(data, LIMITS)[0])


def test_threads_share_what_there_is() -> None:
    room = _MemoryBudget()
    held, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal held, most
        for size in (3, 10, 1, 7):
            room.take(size, 10)
            with lock:
                held += size
                most = max(most, held)
            time.sleep(0)
            with lock:
                held -= size
            room.give_back(size)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (held, most) == (0, 10)


def test_a_large_image_is_not_overtaken_for_ever() -> None:
    room = _MemoryBudget()
    order: list[int] = []
    room.take(5, 10)

    def ask(size: int) -> None:
        room.take(size, 10)
        order.append(size)
        room.give_back(size)

    large = threading.Thread(target=ask, args=(10,))
    large.start()
    eventually(lambda: len(room._asking) == 1)
    small = threading.Thread(target=ask, args=(5,))
    small.start()
    eventually(lambda: len(room._asking) == 2)
    assert order == [], "there is room for the small one, but it came later"
    room.give_back(5)
    large.join(120)
    small.join(120)
    assert order == [10, 5]


def test_whoever_gives_up_waiting_leaves_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    room = _MemoryBudget()
    room.take(10, 10)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room._changed, "wait_for", stop)
    with pytest.raises(KeyboardInterrupt):
        room.take(1, 10)
    assert not room._asking


def test_a_forked_child_has_all_of_it() -> None:
    program = """
import os
from code_worker.images.memory import reserved_memory
with reserved_memory(10, 10):
    if (child := os.fork()) == 0:
        with reserved_memory(10, 10):
            os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "7"


def test_more_than_all_of_it_is_refused_at_once() -> None:
    with (
        pytest.raises(ImageRejectedError, match="decoding would take 11 bytes; the limit is 10") as caught,
        reserved_memory(11, 10),
    ):
        pass
    assert caught.value.reason is RejectReason.TOO_MANY_PIXELS
    data = encoded(pixels(400, 300), "PNG")
    with pytest.raises(ImageRejectedError, match="decoding would take 480000 bytes"):
        decode(data, LimitSettings(max_decode_bytes=479_999))
    assert decode(data, LimitSettings(max_decode_bytes=480_000))[1].width == 400


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(pixels(400, 300), "PNG"), 4 * 120_000),
        (encoded(pixels(400, 300).convert("L"), "PNG"), 120_000),
        (encoded(pixels(400, 300).convert("P"), "GIF"), 2 * 120_000),
        (encoded(pixels(400, 300), "WEBP"), 12 * 120_000),
        (encoded(pixels(400, 300), "JPEG"), 4 * 120_000),
        (encoded(pixels(400, 300), "JPEG", progressive=True, subsampling="4:2:0"), 7 * 120_000),
        (encoded(pixels(400, 300), "JPEG", progressive=True, subsampling="4:4:4"), 10 * 120_000),
        (encoded(pixels(400, 300), "BMP"), 4 * 120_000),
        (encoded(pixels(400, 300), "TIFF"), 4 * 120_000),
        (encoded(pixels(400, 300), "TIFF", tiffinfo={274: 6}), 8 * 120_000),
        (encoded(pixels(400, 300), "TIFF", compression="tiff_lzw", strip_size=1 << 30), 8 * 120_000),
    ],
)  # fmt: skip
def test_what_decoding_takes_is_told_by_the_header(data: bytes, expected: int) -> None:
    with open_image(kind_of(data), ImageBytes(data)) as image:
        assert pillow_bytes(image, data) == expected


def test_a_machine_without_memory_blames_no_image() -> None:
    if sys.platform != "linux":  # macOS does not keep to a limit of the address space
        return
    # A process of its own, that may have little more than it has when it begins to decode.
    program = """
import resource, sys
from tests.corpus.bombs import MOST, zeros
from tests.image_files import png
from code_worker.errors import TransientError
from code_worker.images.decode import decode
from code_worker.settings import LimitSettings
data = png(MOST, MOST, colour=6, body=zeros(MOST * (MOST * 4 + 1)))
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + 100_000_000, now + 100_000_000))
try:
    decode(data, LimitSettings())
except TransientError as error:
    print(error.reason.value, type(error.__cause__).__name__)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["internal", "MemoryError"]


def test_a_length_that_asks_for_too_much_is_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(kind: str, file: ImageBytes) -> None:
        bytearray(1 << 62)

    monkeypatch.setattr(decoding, "open_image", ask)
    with pytest.raises(ImageRejectedError) as caught:
        decode(encoded(pixels(30, 30), "PNG"), LIMITS)
    assert caught.value.reason is RejectReason.CORRUPT


def test_a_small_jpeg_may_have_many_scans() -> None:
    data = _scans(150, 300)
    np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))


def test_a_list_of_strips_longer_than_any_image_is_refused() -> None:
    count = 300_000
    tags = {256: (3, [64]), 257: (3, [64]), 258: (3, [8]), 262: (3, [1]), 277: (3, [1]), 279: (4, [1])}
    data = bytearray(tiff(tags | {273: (4, [8])}, bytes(4 * count)))
    at = data.index((273).to_bytes(2, "little") + b"\4\0\1\0\0\0")
    data[at + 4 : at + 8] = count.to_bytes(4, "little")
    with pytest.raises(ImageRejectedError, match="300000 strips or tiles") as caught:
        decode(bytes(data), LIMITS)
    assert caught.value.reason is RejectReason.CORRUPT


def test_a_tiff_may_consist_of_metadata() -> None:
    data = encoded(pixels(300, 300), "TIFF", icc_profile=bytes(9_000_000))
    np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))


def test_a_header_that_pillow_would_go_through_for_minutes_is_left() -> None:
    jpeg = encoded(pixels(300, 260), "JPEG")
    assert decode(jpeg[:2] + b"\xff" * 50_000 + jpeg[2:], LIMITS)[1].width == 300
    with pytest.raises(ImageRejectedError, match="too many parts"):
        decode(jpeg[:2] + b"\xff" * 200_000 + jpeg[2:], LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_large_good_file_is_within_all_of_these_limits(kind: str) -> None:
    data = encoded(pixels(1600, 1200), kind)
    np.testing.assert_array_equal(decode(data, LIMITS)[0], reference(data))
