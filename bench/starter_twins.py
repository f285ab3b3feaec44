"""What the starter is worth: the same encoder untrained, and one trained with a supervised loss, on the same images.

`python -m bench.starter_twins DIRECTORY [--steps 600]`, on the directory of `bench.starter`: linear head's balanced
accuracy over held-out photographs, per generator, clean and transformed. The supervised twin sees the plain view of
each image alone, so that a step of it costs a quarter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.starter import HOME, MINIATURE
from code_worker.encoder.architecture import VitConfig
from code_worker.encoder.weights import read_weights
from code_worker.plugins import load_plugins
from code_worker.settings import Settings
from code_worker.training.fitting.batches import BatchMaker, ImageCache, RecordSampler, ViewSettings, batches
from code_worker.training.fitting.job import TRAIN_FILE, VALIDATION_FILE, Item, read_items, read_job
from code_worker.training.fitting.measure import Measurer, spread
from code_worker.training.fitting.network import TrainableEncoder

REAL, FAKE = 0, 4


def main() -> None:
    """Prints a line of JSON for each."""
    parser = argparse.ArgumentParser(prog="bench.starter_twins")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    job, config = read_job(arguments.directory), VitConfig(**MINIATURE)
    train = read_items(arguments.directory / TRAIN_FILE)
    holdout = read_items(arguments.directory / VALIDATION_FILE)
    measurer = Measurer(
        spread(train, job.evaluated_items), holdout, job.limits, load_plugins(Settings()), size=config.image_size
    )
    starter = TrainableEncoder(config)
    starter.vit.load_state_dict(read_weights(HOME).state)
    show("starter", measurer, starter)
    show("untrained, timm's start", measurer, TrainableEncoder.fresh(config, seed=1))
    untrained = TrainableEncoder.fresh(config, seed=1, start="cosine")
    show("untrained, cosine start", measurer, untrained)
    supervised(untrained, train, arguments.steps)
    show(f"supervised, {arguments.steps} steps", measurer, untrained)


def supervised(encoder: TrainableEncoder, items: list[Item], steps: int, records: int = 48) -> None:
    """Trains with binary cross-entropy on a linear layer over the embedding."""
    maker = BatchMaker(
        ImageCache(items, Settings().limits),
        RecordSampler(items, new_share=0),
        ViewSettings(size=encoder.config.image_size, resize=False),
        records=records,
        seed=1,
        rank=0,
    )
    head = torch.nn.Linear(encoder.config.width, 1)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=2e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.05)
    labels = torch.cat([torch.zeros(records), torch.ones(records)])
    for batch in batches(maker, range(steps)):
        logits = head(encoder(torch.cat([batch[:, REAL], batch[:, FAKE]]))).squeeze(1)
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        optimiser.step()
        schedule.step()


def show(name: str, measurer: Measurer, encoder: TrainableEncoder) -> None:
    """Balanced accuracy of the linear head for each generator, and their mean."""
    figures = measurer.measure(encoder).figures
    line: dict[str, object] = {"encoder": name}
    for kind in ("clean", "transformed"):
        real = figures[f"linear/{kind}/real"]
        toys = {
            key.rpartition("/")[2]: round((real + value) / 2, 3)
            for key, value in figures.items()
            if key.startswith(f"linear/{kind}/toy-")
        }
        line[kind] = {"mean": round(sum(toys.values()) / len(toys), 3), **toys}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
