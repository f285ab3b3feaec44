"""The training process, seen from outside: started, watched, stopped, and what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from code_worker.errors import TrainingError
from code_worker.logs import get_logger, redact
from code_worker.store import runs
from code_worker.training.job import FAILED_STATUS

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.training.lease import Held

__all__ = ["RESULT", "Progress", "train"]

RESULT: Final = "result"
FAILURE: Final = "failure.json"
Progress = Callable[[Mapping[str, Any]], None]
"""Hears what `progress.json` says."""
_STARTS: Final = 3
_POLL_S: Final = 0.2
_STOP_S: Final = 60.0
_LOG_TAIL: Final = 600
_SUPERVISOR_ENV: Final = "CODE_WORKER_SUPERVISOR_PID"
log = get_logger(__name__)


def train(directory: Path, settings: Settings, held: Held, progress: Progress, *, lock: int) -> None:
    """Trains in a process of its own until the result is written; one that dies unexplained is started again.

    It takes up its last checkpoint each time. Metrics go to the store as they come.

    Args:
        directory: of the job, see `training.job`.
        settings: how many processes, and how long at most.
        held: the run.
        progress: hears where it stands.
        lock: descriptor that each child holds open as long as it lives.

    Raises:
        TrainingError: it failed for the reason it gave, died too often, or took too long.
        RunLostError, RunStoppedError: see `Held.check`; the child was ended before.
    """
    deadline = time.monotonic() + settings.training.timeout_s
    for _ in range(_STARTS):
        if (directory / RESULT).is_dir():
            return
        status = _Watched(directory, settings, held, progress).run(deadline, lock)
        if (directory / RESULT).is_dir():
            return
        # torchrun hides its processes' status behind one of its own.
        if status == FAILED_STATUS or (directory / FAILURE).is_file():
            raise TrainingError(_reason(directory))
        log.warning("training_process_died", run=held.lease.run_id, status=status)
    raise TrainingError(f"the training process ended {_STARTS} times with status {status}: {_tail(directory)}")


class _Watched:
    """One life of the training process."""

    def __init__(self, directory: Path, settings: Settings, held: Held, progress: Progress) -> None:
        self._directory = directory
        self._settings = settings
        self._held = held
        self._progress = progress
        self._sent = 0

    def run(self, deadline: float, lock: int) -> int:
        """Exit status; negative: the signal."""
        with (self._directory / "train.log").open("ab") as output:
            process = subprocess.Popen(
                _command(self._directory, self._settings),
                env=_environment(self._settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock,),
                # Ctrl-C in a terminal reaches this process, which then ends the child in order.
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                self._held.check()
                self._look()
                if time.monotonic() > deadline:
                    raise TrainingError(
                        f"training took longer than {self._settings.training.timeout_s} s "
                        "(CODE_WORKER_TRAINING__TIMEOUT_S)"
                    )
                time.sleep(_POLL_S)
            self._look()
            return process.returncode
        finally:
            _end(process)

    def _look(self) -> None:
        if (said := _read_json(self._directory / "progress.json")) is not None:
            self._progress(said)
        measured = _metrics(self._directory / "metrics.jsonl")
        if len(measured) != self._sent:
            self._held.write(lambda session: runs.add_metrics(session, self._held.lease, measured))
            self._sent = len(measured)


def _command(directory: Path, settings: Settings) -> list[str]:
    train_here = ["-m", "code_worker.training.process", str(directory)]
    count = settings.training.processes
    if count > 1:
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        train_here = [*several, *train_here]
    # Tied to this process: it must not train on for nobody when this one is killed.
    return [sys.executable, "-m", "code_worker.worker.lifeline", sys.executable, *train_here]


def _environment(settings: Settings) -> dict[str, str]:
    own = {"CODE_WORKER_DATA_DIR": str(settings.data_path), _SUPERVISOR_ENV: str(os.getpid())}
    if settings.plugins_dir is not None:
        own["CODE_WORKER_PLUGINS_DIR"] = str(settings.plugins_dir)
    return {**os.environ, **own}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks for a checkpoint and an end, and insists after a while."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _metrics(path: Path) -> list[runs.RunMetrics]:
    """Points of the curves; a line that is still being written is left for the next look."""
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                point = json.loads(line)
                found.append(runs.RunMetrics(point["epoch"], point["step"], point["metrics"]))
    return found


def _reason(directory: Path) -> str:
    failure = _read_json(directory / FAILURE)
    return str(failure["reason"]) if failure else f"training failed and could not say why: {_tail(directory)}"


def _tail(directory: Path) -> str:
    try:
        text = (directory / "train.log").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"no log ({error.strerror})"
    return redact(" ".join(text[-_LOG_TAIL:].split())) or "it said nothing"
