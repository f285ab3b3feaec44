"""Installs what a lock pins into the environment whose Python runs this, with all hashes checked and nothing besides.

uv does it, which unpacks several packages at a time; pip fetches it, and says which index and certificates to use.
Where uv cannot be had or fails, pip installs as well, one package after the other.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

DISK_GB = {"demo": 5.1, "lock": 6.1}
"""Size of an environment with all that a lock pins; `tests/test_requirements.py` holds it against one."""
_PIN = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^\s;\\]+)")
# It compiles kernels for GPUs; a fifth of the whole.
_GPU_ONLY = ("triton",)
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
_UV_LOCK = Path(__file__).with_name("uv.txt")
# Of pip's settings those that say where packages come from, and what uv calls them.
_UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
}


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
    if fault := install(missing, fetched_uv()):
        print(fault, file=sys.stderr)
    return int(bool(fault))


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
        "and half of that to download; one or two minutes on two cores and a fast line.",
        flush=True,
    )
    return ""


def size_gb(pin: Pin) -> float:
    """Size of an installed package by its own record, in GB."""
    return sum(file.size or 0 for file in distribution(pin.name).files or ()) / 1e9


def fetched_uv() -> Path | None:
    """Where uv is, installed beside the rest, if the index has it for this machine."""
    uv = Path(sys.prefix) / "bin" / "uv"
    if not uv.exists():
        _run([*_PIP, "install", "--quiet", "--no-compile", "--require-hashes", "-r", str(_UV_LOCK)])
    return uv if uv.exists() else None


def install(missing: Sequence[Pin], uv: Path | None) -> str:
    """Returns nothing, or what pip printed when even that failed."""
    for left in Path(sys.prefix).glob(".install-*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    # In the environment, so that uv moves what it unpacked by hard links.
    with tempfile.TemporaryDirectory(prefix=".install-", dir=sys.prefix) as directory:
        wanted, cache = Path(directory) / "wanted.txt", Path(directory) / "cache"
        wanted.write_text("\n".join(pin.text for pin in missing) + "\n", encoding="utf-8")
        what = ["--quiet", "--no-deps", "--require-hashes", "-r", str(wanted)]
        with progress(len(missing), cache):
            if uv:
                # The first index that has a package need not have the version; the hash says which file it must be.
                command = [str(uv), "pip", "install", "--python", sys.executable, "--cache-dir", str(cache)]
                options = ["--system-certs", "--index-strategy", "unsafe-best-match", "--link-mode", "hardlink"]
                if not (fault := _run([*command, *options, *what], uv_environment(_pip_settings()))):
                    return ""
                print(f"uv failed, pip installs in its place:\n{fault}", file=sys.stderr, flush=True)
            return _run([*_PIP, "install", "--no-compile", *what])


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What the command printed if it failed, else nothing."""
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    return ended.stdout or f"{command[0]} ended with {ended.returncode}" if ended.returncode else ""


def _pip_settings() -> str:
    """As `pip config list` prints them, a line each: `section.name='value'`."""
    command = [*_PIP, "config", "list"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout


def uv_environment(pip_settings: str) -> dict[str, str]:
    """The environment in which uv takes packages from where pip would; what names uv's own settings is left alone."""
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):  # the later ones count more
        for line in pip_settings.splitlines():
            key, _, value = line.partition("=")
            its_section, _, name = key.rpartition(".")
            if its_section == section and name in _UV_NAMES:
                found[_UV_NAMES[name]] = str(ast.literal_eval(value)).strip()
    # pip separates by white space, uv these by commas.
    if "UV_FIND_LINKS" in found:
        found["UV_FIND_LINKS"] = ",".join(found["UV_FIND_LINKS"].split())
    return {name: " ".join(value.split()) for name, value in found.items() if value} | os.environ


@contextmanager
def progress(packages: int, cache: Path) -> Iterator[None]:
    """Says how many packages are unpacked: on a terminal one line, kept alive by a clock, else a line a quarter."""
    began, ended, terminal = time.monotonic(), threading.Event(), sys.stdout.isatty()

    def watch() -> None:
        quarters = 0
        while not ended.wait(1):
            done = min(packages, sum(1 for _ in cache.glob("archive-v*/*/*.dist-info")))
            line = f"  {done:3} of {packages} packages  {time.monotonic() - began:4.0f} s"
            if terminal:
                print(f"\r{line}", end="", flush=True)
            elif 4 * done // packages > quarters:
                quarters = 4 * done // packages
                print(line, flush=True)

    clock = threading.Thread(target=watch, daemon=True)
    clock.start()
    try:
        yield
    finally:
        ended.set()
        clock.join()
        print(f"{chr(13) if terminal else ''}  installed in {time.monotonic() - began:.0f} s       ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
