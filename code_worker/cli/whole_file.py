"""Where a command writes what it was asked for: stdout, or a file that is whole or not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from code_worker.disk import whole_file
from code_worker.errors import ConfigurationError

__all__ = ["output_stream"]


@contextmanager
def output_stream(path: Path | None) -> Iterator[IO[str]]:
    """A text stream into `path`, or stdout for None; when the block fails, what was at `path` stays as it was.

    Raises:
        ConfigurationError: it cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    with ExitStack() as stack:
        try:
            # A device or a pipe is written to, not replaced.
            special = path.exists() and not path.is_file()
            target = path if special else stack.enter_context(whole_file(path, private=True))
            file = stack.enter_context(target.open("w", encoding="utf-8", newline=""))
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error
        yield file
