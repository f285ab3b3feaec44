"""Installs what a lock pins, several packages at a time, into the environment whose Python runs this.

pip unpacks one wheel after the other on one core, and writes a line or more for each. Here several of them share the
work, each with packages of its own, all with hashes checked and without dependencies, since a lock is complete.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

DISK_GB = {"demo": 5.1, "lock": 6.1}
"""Size of an environment with all that a lock pins; `tests/test_requirements.py` holds it against one."""
_PIN = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^\s;\\]+)")
# Most of the bytes: they start first, and the small ones fill what is left of the time.
_LARGE = (
    *("torch", "nvidia-cudnn", "nvidia-cublas", "triton", "nvidia-cufft", "nvidia-cusparse", "nvidia-cusolver"),
    *("nvidia-nccl", "nvidia-nvshmem", "nvidia-cuda-nvrtc", "openvino", "pyarrow", "transformers", "scipy"),
)
_FEW = 12
# It compiles kernels for GPUs; a fifth of the whole.
_GPU_ONLY = ("triton",)
_PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--no-compile", "--no-deps")


@dataclass(frozen=True, slots=True)
class Pin:
    """One package of a lock: `text` is its line with the hashes below."""

    name: str
    version: str
    text: str

    @property
    def installed(self) -> bool:
        """Whether this very version is there."""
        try:
            return version(self.name) == self.version
        except PackageNotFoundError:
            return False


def main(argv: Sequence[str] | None = None) -> int:
    """Installs and returns 0, or says what failed and returns 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", type=Path)
    lock: Path = parser.parse_args(argv).lock
    wanted = [pin for pin in pins(lock) if has_gpu() or pin.name not in _GPU_ONLY]
    missing = [pin for pin in wanted if not pin.installed]
    if not missing:
        return 0
    if fault := announce(lock.stem, [pin for pin in wanted if pin.installed], missing):
        print(fault, file=sys.stderr)
        return 1
    failures = install(chunks(missing), len(missing))
    for output in failures:
        print(output, file=sys.stderr)
    return 1 if failures else 0


def pins(lock: Path) -> Iterator[Pin]:
    """The packages that a lock pins, some of them for other machines."""
    for text in re.split(r"\n(?=\S)", lock.read_text(encoding="utf-8")):
        if match := _PIN.match(text):
            yield Pin(match["name"], match["version"], text)


def has_gpu() -> bool:
    """Whether the machine shows an NVIDIA device."""
    return any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/dxg"))


def announce(lock: str, installed: Sequence[Pin], missing: Sequence[Pin]) -> str:
    """Says what is coming; returns what to do where the disk is too small for it, else nothing."""
    needed_gb = max(0.1, DISK_GB[lock] - sum(map(size_gb, installed)))
    free_gb = shutil.disk_usage(sys.prefix).free / 1e9
    if free_gb < needed_gb:
        return f"{sys.prefix} has {free_gb:.1f} GB free, {needed_gb:.1f} are needed: make room, or clone elsewhere"
    torch = ", most of it torch," if "torch" in {pin.name for pin in missing} else ""
    print(
        f"Installing {len(missing)} packages into {Path(sys.prefix).name}: about {needed_gb:.1f} GB on disk{torch} "
        "and half of that to download; one to three minutes on two cores and a fast line.",
        flush=True,
    )
    return ""


def size_gb(pin: Pin) -> float:
    """Size of an installed package by its own record, in GB."""
    return sum(file.size or 0 for file in distribution(pin.name).files or ()) / 1e9


def chunks(missing: Sequence[Pin]) -> list[list[Pin]]:
    """Large packages alone and first, the others a few at a time."""
    large = sorted((pin for pin in missing if pin.name.startswith(_LARGE)), key=_rank)
    small = [pin for pin in missing if not pin.name.startswith(_LARGE)]
    return [[pin] for pin in large] + [small[at : at + _FEW] for at in range(0, len(small), _FEW)]


def _rank(pin: Pin) -> int:
    return next(number for number, start in enumerate(_LARGE) if pin.name.startswith(start))


def install(parts: Sequence[Sequence[Pin]], packages: int) -> list[str]:
    """Runs pip for each part, as many at a time as there are cores; returns what failing ones printed."""
    failures = []
    with (
        tempfile.TemporaryDirectory() as directory,
        progress(packages) as done,
        ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 1))) as pool,
    ):
        running = {pool.submit(_pip, Path(directory) / f"{n}.txt", part): part for n, part in enumerate(parts)}
        for ended in as_completed(running):
            if output := ended.result():
                failures.append(output)
                pool.shutdown(wait=False, cancel_futures=True)
                break
            done(len(running[ended]))
    return failures


def _pip(requirements: Path, part: Sequence[Pin]) -> str:
    """What pip printed if it failed, else nothing."""
    requirements.write_text("\n".join(pin.text for pin in part) + "\n", encoding="utf-8")
    command = [sys.executable, *_PIP, "--require-hashes", "-r", str(requirements)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return ended.stdout or f"pip ended with {ended.returncode}" if ended.returncode else ""


@contextmanager
def progress(packages: int) -> Iterator[Callable[[int], None]]:
    """Yields what counts packages as done: one line on a terminal, kept alive by a clock, else a line a quarter."""
    began, done, ended = time.monotonic(), [0], threading.Event()
    terminal = sys.stdout.isatty()

    def line() -> str:
        return f"  {done[0]:3} of {packages} packages  {time.monotonic() - began:4.0f} s"

    def tick() -> None:
        while not ended.wait(1):
            print(f"\r{line()}", end="", flush=True)

    def count(more: int) -> None:
        quarters = 4 * done[0] // packages
        done[0] += more
        if not terminal and 4 * done[0] // packages > quarters:
            print(line(), flush=True)

    clock = threading.Thread(target=tick, daemon=True)
    if terminal:
        clock.start()
    try:
        yield count
    finally:
        ended.set()
        if terminal:
            clock.join()
            print(f"\r{line()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
