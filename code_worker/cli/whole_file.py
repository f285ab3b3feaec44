"""A file that appears under its name only once it is complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

from code_worker.errors import ConfigurationError

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: Path | None) -> Iterator[IO[str]]:
    """A text stream into `path`, or stdout for None; when the block fails, what was at `path` stays as it was.

    Raises:
        ConfigurationError: it cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    try:
        # A device or a pipe is written to, not replaced.
        special = path.exists() and not path.is_file()
        file = path.open("w", encoding="utf-8", newline="") if special else _beside(path)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error
    try:
        with file:
            yield file
            file.flush()
            if not special:
                os.fsync(file.fileno())
                Path(file.name).replace(path)
    except BaseException:
        if not special:
            Path(file.name).unlink(missing_ok=True)
        raise


def _beside(path: Path) -> IO[str]:
    directory = path.absolute().parent
    return NamedTemporaryFile("w", encoding="utf-8", newline="", dir=directory, prefix=f".{path.name}.", delete=False)
