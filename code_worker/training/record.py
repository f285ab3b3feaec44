"""What a training process leaves for those who watch it: progress, metrics, curves, and at last the result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from code_worker.disk import whole_directory, whole_file
from code_worker.encoder.weights import save_weights
from code_worker.errors import TrainingError
from code_worker.logs import get_logger
from code_worker.training.pictures import draw_embeddings

if TYPE_CHECKING:
    from code_worker.encoder.weights import EncoderWeights
    from code_worker.training.measure import Measured

__all__ = ["RESULT", "Record"]

RESULT: Final = "result"
log = get_logger(__name__)
_PROGRESS_EVERY_S: Final = 1.0


class Record:
    """Files in a job's directory; written whole, so that a reader never meets half of one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metrics = directory / "metrics.jsonl"
        self._told = 0.0
        self._writer: Any = None

    def forget_after(self, step: int) -> None:
        """A resumed run measures again what lies after its checkpoint."""
        if self._metrics.is_file():
            lines = self._metrics.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            _write(self._metrics, "".join(f"{line}\n" for line in kept))

    def progress(self, *, stage: str, force: bool = False, **figures: float | None) -> None:
        """Writes `progress.json`, once a second at most unless forced."""
        now = time.monotonic()
        if force or now - self._told >= _PROGRESS_EVERY_S:
            self._told = now
            _write(self.directory / "progress.json", json.dumps({"stage": stage, **figures}) + "\n")

    def epoch(self, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Appends an epoch's figures to `metrics.jsonl` and to TensorBoard's log."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, "step": step, "metrics": dict(metrics)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if (writer := self._tensorboard()) is not None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    def _tensorboard(self) -> Any:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter  # seconds to import, and an extra
            except ImportError:
                log.info("no_tensorboard", hint="pip install 'code-worker[training]'")
                self._writer = False
            else:
                self._writer = SummaryWriter(self.directory / "tensorboard")
        return self._writer or None

    def picture(self, epoch: int, measured: Measured) -> None:
        """Draws the validation part's embeddings."""
        path = self.directory / "pictures" / f"epoch-{epoch:04}.png"
        path.parent.mkdir(exist_ok=True)
        draw_embeddings(path, measured.embeddings, measured.groups, title=f"Hold-out after epoch {epoch}")

    def result(self, weights: EncoderWeights, report: Mapping[str, Any]) -> None:
        """Puts the trained encoder and its report into `result/`, all of it at once."""
        try:
            with whole_directory(self.directory / RESULT) as partial:
                save_weights(weights, partial)
                _write(partial / "report.json", json.dumps(report, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise TrainingError(f"the result cannot be written to {self.directory}: {error.strerror}") from error

    def failure(self, reason: str, step: int | None) -> None:
        """Says why there is no result."""
        _write(self.directory / "failure.json", json.dumps({"reason": reason, "step": step}) + "\n")

    def broken(self, images: Mapping[str, str]) -> Sequence[dict[str, str]]:
        """Images that could not be decoded, for the report."""
        return [{"path": path, "reason": reason} for path, reason in sorted(images.items())]

    def close(self) -> None:
        """Ends TensorBoard's log."""
        if self._writer:
            self._writer.close()


def _write(path: Path, text: str) -> None:
    with whole_file(path, durable=False) as partial:
        partial.write_text(text, encoding="utf-8")
