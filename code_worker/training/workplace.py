"""The directory a run works in: one process at a time, kept until it is done, the last few for looking back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from code_worker.disk import locked, make_private
from code_worker.errors import TrainingError
from code_worker.logs import get_logger

__all__ = ["Workplace"]

log = get_logger(__name__)
_LOCK: Final = "lock"
_KEPT_RUNS: Final = 10


class Workplace:
    """`runs/<run id>` in the data directory."""

    def __init__(self, runs: Path, run_id: str) -> None:
        self.runs = runs
        self.path = runs / run_id
        self._descriptor: int | None = None

    @property
    def job(self) -> Path:
        """Where the training process works."""
        return self.path / "job"

    @property
    def candidate(self) -> Path:
        """The release directory, before it is registered."""
        return self.path / "release"

    @property
    def lock(self) -> int:
        """Descriptor of the lock, to be inherited by children.

        A child that outlives its killed parent holds the lock until it has ended, and nobody works beside it.
        """
        if self._descriptor is None:
            raise RuntimeError("the workplace is not open")
        return self._descriptor

    @contextmanager
    def open(self, check: Callable[[], None], *, wait_s: float) -> Iterator[None]:
        """Makes the directory and keeps others out; waits for one who is on the way out, calling `check` meanwhile.

        Raises:
            TrainingError: it cannot be made, or somebody else did not leave it in time.
        """
        try:
            make_private(self.path)
            held = ExitStack()
            descriptor = held.enter_context(locked(self.path / _LOCK, wait_s=wait_s, check=check))
        except BlockingIOError:
            raise TrainingError(f"a process of an earlier attempt still works in {self.path}: end it") from None
        except OSError as error:
            raise TrainingError(f"cannot work in {self.path}: {error.strerror}") from error
        with held:
            self._descriptor = descriptor
            try:
                yield
            finally:
                self._descriptor = None

    def tidy(self) -> None:
        """Drops what only a run under way needs, and whole directories of runs long past."""
        for path in (self.candidate, self.job / "checkpoints", self.job / "initial"):
            shutil.rmtree(path, ignore_errors=True)
        # Ids of runs are in the order of time.
        for path in sorted(self.runs.glob("*/"), reverse=True)[_KEPT_RUNS:]:
            log.info("run_directory_dropped", run=path.name)
            shutil.rmtree(path, ignore_errors=True)
