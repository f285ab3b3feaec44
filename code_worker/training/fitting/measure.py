"""Measures an epoch on images that the encoder never learned from, and records progress, metrics and the result."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from PIL import Image

from code_worker.data.datasets.examples import group_of
from code_worker.encoder.weights import save_weights
from code_worker.errors import ImageRejectedError, TrainingError
from code_worker.heads import fit_head
from code_worker.images.decode import decode_crop, decode_whole
from code_worker.logs import get_logger
from code_worker.system.files import whole_directory, whole_file
from code_worker.training.evaluation.plots import draw_embeddings
from code_worker.training.fitting.augment import Augmenter
from code_worker.types import EMBEDDING_DIM, IMAGE_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights
    from code_worker.plugins import Plugins
    from code_worker.settings import LimitSettings
    from code_worker.training.fitting.job import Item
    from code_worker.training.fitting.network import TrainableEncoder

_LINEAR: Final = "linear"
HEADS: Final = (_LINEAR, "knn", "svm")
_CHUNK: Final = 64
_CLEAN, _TRANSFORMED = "clean", "transformed"


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One epoch's figures, and the validation part's embeddings for a picture.

    Attributes:
        figures: `head/set/group` → accuracy, groups being `real`, `fake`, `mean` of the two, and each generator.
        linear: mean of the linear head over both sets: what decides which epoch was best.
        confidence: probability that the linear head gives to what is right, by group, over both sets: it moves
            before an accuracy does.
        embeddings: `(n, 192) float32` of the untransformed validation part.
        groups: its generators, `real` for real images.
    """

    figures: Mapping[str, float]
    linear: float
    confidence: Mapping[str, float]
    embeddings: NDArray[np.float32]
    groups: Sequence[str]


class Measurer:
    """Holds the crops it measures with; the images are decoded once.

    Raises:
        TrainingError: a class of which no image can be decoded.
    """

    def __init__(
        self, fit: Sequence[Item], validation: Sequence[Item], limits: LimitSettings, plugins: Plugins, *, size: int
    ) -> None:
        self._size = size
        self._limits = limits
        self._heads = {name: plugins.head_class(name) for name in HEADS if name in plugins.heads()}
        self._fit, self._fit_crops = self._decoded(fit, "to fit heads on")
        self._validation, self._clean = self._decoded(validation, "to measure on")
        self._changed = np.stack([self._transformed(item) for item in self._validation])

    def _decoded(self, items: Sequence[Item], what: str) -> tuple[list[Item], NDArray[np.uint8]]:
        margin = (IMAGE_SIZE - self._size) // 2
        inner = slice(margin, IMAGE_SIZE - margin)
        found, crops = [], []
        for item in items:
            try:
                crop = decode_crop(Path(item.path).read_bytes(), self._limits)
            except (ImageRejectedError, OSError):
                continue
            found.append(item)
            crops.append(crop[inner, inner].copy())
        if {item.label for item in found} != {0, 1}:
            raise TrainingError(f"of {len(items)} images {what}, not both real and generated ones can be decoded")
        return found, np.stack(crops)

    def _transformed(self, item: Item) -> NDArray[np.uint8]:
        """The centre after augmentations that the content's hash draws: the same in every epoch and run."""
        whole = decode_whole(Path(item.path).read_bytes(), self._limits)
        rng = np.random.default_rng(int(item.sha256[:16], 16))
        # Augmentations of what the encoder sees and a margin, not of a whole photograph.
        image = Augmenter(self._size)(_centre(whole, 2 * self._size), rng)
        return np.asarray(_centre(image, self._size))

    def measure(self, encoder: TrainableEncoder, heads: Sequence[str] = HEADS) -> Measured:
        """Fits each head, `linear` among them, on the fitting images' embeddings and counts what it gets right."""
        fit = _embed(encoder, self._fit_crops)
        labels = np.array([item.label for item in self._fit], np.int8)
        sets = {_CLEAN: _embed(encoder, self._clean), _TRANSFORMED: _embed(encoder, self._changed)}
        figures: dict[str, float] = {}
        confidence: dict[str, float] = {}
        for name in (each for each in self._heads if each in heads):
            head = fit_head(self._heads[name](), fit, labels)
            scores = {kind: head.score(embeddings) for kind, embeddings in sets.items()}
            for kind, values in scores.items():
                for group, value in self._right(values >= 0.5).items():
                    figures[f"{name}/{kind}/{group}"] = value
            if name == _LINEAR:
                confidence = self._confidence(np.mean(list(scores.values()), axis=0))
        linear = (figures[f"linear/{_CLEAN}/mean"] + figures[f"linear/{_TRANSFORMED}/mean"]) / 2
        return Measured(figures, linear, confidence, sets[_CLEAN], [_group(item) for item in self._validation])

    def _confidence(self, scores: NDArray[np.floating[Any]]) -> dict[str, float]:
        labels = np.array([item.label for item in self._validation], bool)
        right = np.where(labels, scores, 1 - scores)
        groups = np.array([_group(item) for item in self._validation])
        of_groups = {name: float(right[groups == name].mean()) for name in sorted(set(groups))}
        return {**of_groups, "fake": float(right[labels].mean())}

    def images(self) -> Mapping[str, int]:
        """Returns how many images of the validation part each group has."""
        return Counter(_group(item) for item in self._validation)

    def _right(self, called_fake: NDArray[np.bool_]) -> dict[str, float]:
        labels = np.array([item.label for item in self._validation], bool)
        right = called_fake == labels
        groups = np.array([_group(item) for item in self._validation])
        real, fake = float(right[~labels].mean()), float(right[labels].mean())
        own = {name: float(right[groups == name].mean()) for name in sorted(set(groups[labels]))}
        return {"mean": (real + fake) / 2, "real": real, "fake": fake, **own}


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, half of them real where so many are, chosen by content hash: always the same."""
    ordered = sorted(items, key=lambda item: item.sha256)
    reals, fakes = ([item for item in ordered if item.label == label] for label in (0, 1))
    real_count = min(len(reals), max(count // 2, count - len(fakes)))
    return reals[:real_count] + fakes[: count - real_count]


def _group(item: Item) -> str:
    return group_of(item.label, item.generator)


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


@torch.inference_mode()
def _embed(encoder: TrainableEncoder, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    device = encoder.mean.device
    encoder.eval()
    parts = [encoder(torch.from_numpy(crops[i : i + _CHUNK]).to(device)) for i in range(0, len(crops), _CHUNK)]
    encoder.train()
    rows = torch.cat(parts).float().cpu().numpy()
    return np.pad(rows, ((0, 0), (0, EMBEDDING_DIM - rows.shape[1])))


RESULT: Final = "result"
log = get_logger(__name__)
_PROGRESS_EVERY_S: Final = 1.0


class TrainingRecord:
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
