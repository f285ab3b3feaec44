"""Trains an encoder from a job: epochs of steps, measured, checkpointed, resumed, stopped early."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from code_worker.encoder.weights import EncoderWeights
from code_worker.errors import TrainingError
from code_worker.logs import get_logger
from code_worker.system.files import whole_file
from code_worker.system.machine import usable_cores
from code_worker.training.fitting.batches import BatchMaker, ImageCache, RecordSampler, ViewSettings, batches
from code_worker.training.fitting.job import for_device, for_encoder
from code_worker.training.fitting.measure import Measured, Measurer, TrainingRecord, spread
from code_worker.training.fitting.network import (
    SHARES,
    WeightAverage,
    broadcast_weights,
    choose_share,
    interpolate_weights,
    lead_decides,
    learning_rate,
    make_optimiser,
    set_learning_rate,
)
from code_worker.training.fitting.objective import VIEWS, DivergenceWatch, Stepper, chance_loss, resolve_precision

if TYPE_CHECKING:
    from torch import Tensor

    from code_worker.plugins import Plugins
    from code_worker.training.fitting.job import Item, TrainingJob
    from code_worker.training.fitting.network import TrainableEncoder, World

log = get_logger(__name__)
_NAME: Final = re.compile(r"step-(\d{9})\.pt")
_KEPT: Final = 2


def write_checkpoint(directory: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state` (tensors, numbers, text, lists and dicts of them) and drops all but the two newest.

    Written beside its place, flushed to the disk and renamed: a reader sees the one before or this one.

    Raises:
        TrainingError: the disk is full or cannot be written; the checkpoints before stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:09}.pt"
    try:
        with whole_file(path) as partial, partial.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch's archive writer turns a full disk into a RuntimeError.
        raise TrainingError(f"step {step}: the checkpoint cannot be written to {directory}: {error}") from error
    for old in (*_found(directory)[:-_KEPT], *directory.glob(".*.partial")):
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Returns what `write_checkpoint` wrote, on the CPU.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        # `weights_only`: a checkpoint is a pickle, and nothing but tensors and plain values may come out of it.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything its unpickler and archive reader meet
        raise TrainingError(f"{path}: no checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise TrainingError(f"{path}: no checkpoint")
    return state


def resume_state(directory: Path) -> dict[str, Any] | None:
    """The newest state that can be read; a damaged file is passed over, and said."""
    for path in reversed(_found(directory)):
        try:
            return read_checkpoint(path)
        except TrainingError as error:
            log.warning("checkpoint_passed_over", error=str(error))
    return None


def _found(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


_CHECKPOINT_EVERY_S = 300.0


class Trainer:
    """One training, from its start or its last checkpoint to its result.

    Everything that chance decides is a function of seed, step and rank: a run that was killed and resumed from any
    checkpoint ends, on a CPU, with the same bits as one that was not.

    Raises:
        TrainingError: images of one class only, or none that can be decoded.
        DivergedError: names the step.
    """

    def __init__(
        self,
        directory: Path,
        job: TrainingJob,
        train: Sequence[Item],
        validation: Sequence[Item],
        encoder: TrainableEncoder,
        *,
        world: World,
        plugins: Plugins,
        champion: EncoderWeights | None = None,
    ) -> None:
        self._job, self._settings, self._world = job, job.settings, world
        self._checkpoints = directory / "checkpoints"
        self._encoder = encoder
        self._champion = champion
        # Before the optimiser and the average copy them.
        broadcast_weights(encoder, world)
        device = encoder.mean.device.type
        self._scale = for_device(job.settings, device)
        self._manner = for_encoder(job.settings, encoder.config.image_size, unseen=job.unseen)
        self._optimiser = make_optimiser(encoder, weight_decay=job.settings.weight_decay, fused=device == "cuda")
        self._stepper = self._make_stepper(device)
        self._average = WeightAverage(encoder, job.settings.ema_decay) if job.settings.ema_decay else None
        # Of the joined batch: with more negatives the loss of chance is higher.
        self._watch = DivergenceWatch(chance_loss(self._scale.records * world.size))
        self._cache = ImageCache(train, job.limits)
        self._maker = self._make_maker(train)
        self._record = TrainingRecord(directory) if world.leads else None
        self._measurer = self._make_measurer(train, validation, plugins) if world.leads else None
        self.step = 0
        self._best: dict[str, Any] = {"linear": -1.0, "epoch": 0, "state": self._state_to_judge()}
        self._history: list[dict[str, Any]] = []
        self._interpolation: dict[str, Any] | None = None
        self._wants_stop = False

    def _make_stepper(self, device: str) -> Stepper:
        return Stepper(
            self._encoder,
            self._optimiser,
            self._world,
            seed=self._settings.seed,
            accumulate=self._settings.accumulate,
            precision=resolve_precision(self._job.precision, device),
            compiled=self._job.compile if self._job.compile is not None else device == "cuda",
        )

    def _make_maker(self, train: Sequence[Item]) -> BatchMaker:
        return BatchMaker(
            self._cache,
            RecordSampler(train, new_share=self._settings.new_share),
            ViewSettings(size=self._encoder.config.image_size, resize=not self._manner.native),
            records=self._scale.records,
            seed=self._settings.seed,
            rank=self._world.rank,
        )

    def _make_measurer(self, train: Sequence[Item], validation: Sequence[Item], plugins: Plugins) -> Measurer:
        assert self._record is not None  # noqa: S101 - the leading process has one
        self._record.progress(stage="decoding", force=True)
        count, size = self._job.evaluated_items, self._encoder.config.image_size
        return Measurer(spread(train, count), spread(validation, count), self._job.limits, plugins, size=size)

    def stop(self) -> None:
        """Asks for a checkpoint and an end after the present step; may be called from a signal handler."""
        self._wants_stop = True

    def run(self) -> bool:
        """Trains to the end or to the best epoch; False when it was stopped before, its state kept."""
        self._resume()
        per_epoch, total = self._scale.steps_per_epoch, self._scale.steps
        while self.step < total and not self._is_patience_over():
            # A resumed run goes on in the middle of its epoch and ends it where it would have ended.
            end = min(total, (self.step // per_epoch + 1) * per_epoch)
            stopped = self._train_until(end)
            # A checkpoint at an epoch's end holds its figures too: a resumed run does not measure it again.
            if self.step == end:
                self._end_epoch(end // per_epoch)
            elif stopped:
                self._keep()
            if stopped and self.step < total:
                return False
        if self._record is not None:
            self._interpolate()
            self._record.result(self._best_weights(), self._report())
        return True

    def _train_until(self, end: int) -> bool:
        """Takes the steps of an epoch; True when it was asked to stop meanwhile."""
        kept, began, first = time.monotonic(), time.monotonic(), self.step
        source = batches(
            self._maker, range(self.step, end), processes=self._loader_processes(), pin=self._device == "cuda"
        )
        for batch in source:
            self._advance(batch)
            if self._record is not None:
                done_s = time.monotonic() - began
                self._say_progress((self.step - first) / max(done_s, 1e-9), force=self.step == end)
            # The signal reaches processes at different steps: were each to stop by itself, the others would wait in
            # their next all-reduce.
            if lead_decides(self._wants_stop, self._world):
                return True
            if time.monotonic() - kept > _CHECKPOINT_EVERY_S and self.step < end:
                self._keep()
                kept = time.monotonic()
        return False

    def _advance(self, batch: Tensor) -> None:
        peak, warmup = self._manner.learning_rate, self._settings.warmup_epochs
        set_learning_rate(self._optimiser, learning_rate(self.step, peak, warmup_epochs=warmup, scale=self._scale))
        self._watch.see(self._stepper(batch, self.step), self.step)
        if self._average is not None:
            self._average.update(self._encoder)
        self.step += 1

    def _say_progress(self, steps_per_s: float, *, force: bool) -> None:
        assert self._record is not None  # noqa: S101 - only the leading process speaks
        total = self._scale.steps
        images = self._scale.records * len(VIEWS) * self._world.size
        self._record.progress(
            stage="training",
            force=force,
            epoch=self.step // self._scale.steps_per_epoch + 1,
            step=self.step,
            steps=total,
            loss=self._watch.smooth,
            images_per_s=round(steps_per_s * images, 1),
            eta_s=round((total - self.step) / max(steps_per_s, 1e-9), 1),
        )

    def _end_epoch(self, epoch: int) -> None:
        """Measures, remembers the best weights, and writes a checkpoint that holds both."""
        if self._record is not None and self._measurer is not None:
            measured = self._measured()
            metrics = {**measured.figures, "linear": measured.linear, "loss": self._watch.smooth or 0.0}
            self._history.append({"epoch": epoch, "step": self.step, "metrics": metrics})
            # Strictly better: among equal epochs the first, which has moved least from the champion.
            if measured.linear > self._best["linear"]:
                self._best = {"linear": measured.linear, "epoch": epoch, "state": self._state_to_judge()}
            self._record.epoch(epoch, self.step, metrics)
            log.info(
                "epoch_done", epoch=epoch, step=self.step, linear=round(measured.linear, 4), loss=metrics["loss"]
            )
            if self._job.picture_every and epoch % self._job.picture_every == 0:
                self._record.picture(epoch, measured)
        self._keep()

    def _measured(self) -> Measured:
        assert self._measurer is not None  # noqa: S101 - only the leading process measures
        if self._average is None:
            return self._measurer.measure(self._encoder)
        # Cloned: `state_dict` gives the tensors themselves, which the next line overwrites.
        trained = {name: tensor.clone() for name, tensor in self._encoder.state_dict().items()}
        self._encoder.load_state_dict(self._average.state)
        measured = self._measurer.measure(self._encoder)
        self._encoder.load_state_dict(trained)
        return measured

    def _interpolate(self) -> None:
        """Goes back towards the champion as far as the trained encoder forgot what that one knew."""
        allowed = self._settings.max_forgetting
        if self._champion is None or allowed is None or self._best["epoch"] == 0:
            return
        assert self._measurer is not None  # noqa: S101 - only the leading process is here
        # The training module has the network as `vit` and its normalisation beside it.
        champion = {f"vit.{name}": tensor for name, tensor in self._champion.state.items()}
        trained, measured = self._best["state"], {}
        for share in SHARES:
            self._encoder.load_state_dict(interpolate_weights(champion, trained, share))
            measured[share] = self._measurer.measure(self._encoder, heads=("linear",))
        confidence = {share: one.confidence for share, one in measured.items()}
        share = choose_share(confidence, self._measurer.images(), max_forgetting=allowed)
        self._best.update(state=interpolate_weights(champion, trained, share), linear=measured[share].linear)
        self._interpolation = {"share": share, "confidence": {str(key): value for key, value in confidence.items()}}
        log.info("weights_interpolated", share=share, linear=round(measured[share].linear, 4))

    def _is_patience_over(self) -> bool:
        """Returns whether the linear head has not become better for too many epochs; the leading process knows."""
        epoch = self.step // self._scale.steps_per_epoch
        return lead_decides(epoch - self._best["epoch"] >= self._settings.patience, self._world)

    @property
    def _device(self) -> str:
        return self._encoder.mean.device.type

    def _loader_processes(self) -> int:
        if (wanted := self._settings.loader_processes) is not None:
            return wanted
        # Beside a GPU all cores prepare views; on a CPU they are what trains.
        cores = usable_cores()
        return max(1, cores // self._world.size - 1) if self._device == "cuda" else 0

    def _state_to_judge(self) -> dict[str, Tensor]:
        # The average is what is measured and deployed; the raw weights are only trained on.
        state = self._average.state if self._average is not None else self._encoder.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def _best_weights(self) -> EncoderWeights:
        state = {name.removeprefix("vit."): tensor for name, tensor in self._best["state"].items()}
        return EncoderWeights(self._encoder.config, state, self._job.name)

    def _report(self) -> Mapping[str, Any]:
        assert self._record is not None  # noqa: S101 - only the leading process reports
        return {
            "name": self._job.name,
            "best_epoch": self._best["epoch"],
            "linear": self._best["linear"],
            "steps": self.step,
            "stopped_early": self.step < self._scale.steps,
            "interpolation": self._interpolation,
            "history": self._history,
            "settings": {
                **self._settings.model_dump(mode="json"),
                **asdict(self._scale),
                **asdict(self._manner),
            },
            "broken": self._record.broken(self._cache.broken),
        }

    def _keep(self) -> None:
        # All processes have the same weights and optimiser state: one copy is enough to resume all.
        if not self._world.leads:
            return
        state = {
            "step": self.step,
            "encoder": {name: t.cpu() for name, t in self._encoder.state_dict().items()},
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._stepper.scaler.state_dict(),
            "average": None if self._average is None else self._average.state,
            "watch": self._watch.state(),
            "best": self._best,
            "history": self._history,
        }
        write_checkpoint(self._checkpoints, self.step, state)

    def _resume(self) -> None:
        state = resume_state(self._checkpoints)
        if state is None:
            return
        self.step = state["step"]
        self._encoder.load_state_dict(state["encoder"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._stepper.scaler.load_state_dict(state["scaler"])
        if self._average is not None and state["average"] is not None:
            self._average.state = {name: t.to(self._encoder.mean.device) for name, t in state["average"].items()}
        self._watch.restore(state["watch"])
        self._best, self._history = state["best"], state["history"]
        if self._record is not None:
            self._record.forget_after(self.step)
        log.info("training_resumed", step=self.step)
