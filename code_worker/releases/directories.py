"""Directories of releases on a file system: one process at a time, there whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from code_worker.system.files import flush, make_private
from code_worker.system.files import locked as file_locked

_INCOMPLETE: Final = ".incomplete-"
_ABANDONED_AFTER_S: Final = 24 * 3600.0


@contextlib.contextmanager
def locked(directory: Path, release: str) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    make_private(directory.parent)
    # Other users of the machine may load from a directory of releases that is not in the data directory.
    directory.mkdir(exist_ok=True)
    with file_locked(directory / f".{release}.lock", wait_s=math.inf):
        yield


@contextlib.contextmanager
def working_directory(parent: Path) -> Iterator[Path]:
    """A directory beside the final place, on the same file system; gone afterwards unless it was renamed."""
    _drop_abandoned(parent)
    path = Path(tempfile.mkdtemp(prefix=_INCOMPLETE, dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _drop_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_INCOMPLETE}*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)


def replace_by(target: Path, copy: Path) -> None:
    """Puts a complete copy in the target's place; after a crash there is the whole of it or none."""
    for parent, _, names in os.walk(copy):
        for path in (*(Path(parent) / name for name in names), Path(parent)):
            flush(path)
    copy.chmod(0o755)
    shutil.rmtree(target, ignore_errors=True)
    copy.rename(target)
    flush(target.parent)
