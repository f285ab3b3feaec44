"""What training costs: the objective's share of a step, the trainer beside a bare loop, two processes beside one.

`python -m bench.training [--device cuda]`; alternating rounds, medians and ranges, JSON with `--json FILE`. On a GPU
it prints memory and the time that steps waited for views as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.photographs import LEARNED_FROM, Album
from bench.starter import MINIATURE
from bench.toy_data import write_records
from code_worker.encoder.architecture import VitConfig
from code_worker.settings import LimitSettings, TrainingSettings
from code_worker.training.fitting.batches import BatchMaker, ImageCache, RecordSampler, ViewSettings, batches
from code_worker.training.fitting.job import TrainingJob, write_job
from code_worker.training.fitting.network import TrainableEncoder, World, make_optimiser
from code_worker.training.fitting.objective import VIEWS, Stepper

ROUNDS = 5
_ON_ONE_CORE = (
    "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.execv(sys.argv[1], sys.argv[1:])"
)


def main() -> None:
    """Runs all parts and prints them."""
    parser = argparse.ArgumentParser(prog="bench.training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {"objective_share": objective_share(arguments.device)}
    sizes = {"miniature": (MINIATURE, 48), "vit_tiny": ({}, 256 if arguments.device != "cpu" else 6)}
    for name, (encoder, records) in sizes.items():
        found[f"trainer_{name}"] = trainer_beside_bare_loop(encoder, records, arguments.device)
    if arguments.device == "cpu":
        found["two_processes"] = two_processes()
    for name, figures in found.items():
        print(f"{name}: {json.dumps(figures)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def objective_share(device: str, records: int = 256) -> dict[str, Any]:
    """Extra time of a step with the objective over one with a sum, miniature encoder, `records` records."""
    encoder = TrainableEncoder.fresh(VitConfig(**MINIATURE), seed=0).to(device)
    stepper = Stepper(encoder, make_optimiser(encoder, weight_decay=2e-5, fused=False), World(), seed=0)
    size = encoder.config.image_size
    batch = torch.randint(0, 256, (records, len(VIEWS), size, size, 3), dtype=torch.uint8)

    def bare() -> None:
        encoder.zero_grad(set_to_none=True)
        encoder(batch.to(device).flatten(0, 1)).sum().backward()

    def objective() -> None:
        embeddings = torch.randn(records * len(VIEWS), encoder.config.width, device=device, requires_grad=True)
        stepper.loss(embeddings, records, 0).backward()

    bare()
    objective()
    rounds = [(timed(bare, device), timed(objective, device)) for _ in range(ROUNDS)]
    return {"records": records, "share_of_step": spread([loss / step for step, loss in rounds], 5)}


def trainer_beside_bare_loop(encoder: dict[str, Any], records: int, device: str, steps: int = 6) -> dict[str, Any]:
    """Images/s of steps with views prepared meanwhile, over those of forward and backward on ready tensors."""
    model = TrainableEncoder.fresh(VitConfig(**encoder), seed=0).to(device)
    native = bool(encoder)
    cuda = device != "cpu"
    stepper = Stepper(
        model,
        make_optimiser(model, weight_decay=2e-5, fused=cuda),
        World(),
        seed=0,
        precision="bf16" if cuda else "fp32",
        compiled=cuda,
    )
    with tempfile.TemporaryDirectory() as directory:
        size = 104 if native else 288
        items = write_records(Path(directory), Album(LEARNED_FROM), 200, seed=5, size=size)
        maker = BatchMaker(
            ImageCache(items, LimitSettings()),
            RecordSampler(items, new_share=0.5),
            ViewSettings(size=model.config.image_size, resize=not native),
            records=records,
            seed=0,
            rank=0,
        )
        loaders = max(0, (os.cpu_count() or 1) - 1) if cuda else 0
        rounds = [_round(maker, stepper, model, steps, loaders) for _ in range(ROUNDS)]
    images = records * len(VIEWS) * steps
    return {
        "records": records,
        "trainer_images_per_s": spread([images / ours for ours, _, _ in rounds], 1),
        "bare_images_per_s": spread([images / bare for _, bare, _ in rounds], 1),
        "ratio": spread([bare / ours for ours, bare, _ in rounds]),
        "waited_for_views": spread([waited / ours for ours, _, waited in rounds]),
        **({"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if cuda else {}),
    }


def _round(
    maker: BatchMaker, stepper: Stepper, model: TrainableEncoder, steps: int, loaders: int
) -> tuple[float, float, float]:
    """Seconds of the trainer's steps, of the bare loop's, and of those that the trainer waited for views."""
    device = model.mean.device.type
    source = batches(maker, range(steps + 1), processes=loaders, pin=device != "cpu")
    batch = next(source)
    stepper(batch, 0)
    waited, began = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        asked = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - asked
        stepper(batch, step)
    ours = time.perf_counter() - began
    views = batch.to(device).flatten(0, 1)

    def bare() -> None:
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            stepper.embed(views).sum().backward()

    return ours, timed(bare, device), waited


def two_processes(steps: int = 12, records: int = 24) -> dict[str, Any]:
    """Images/s of two gloo processes of one thread each over those of one such process, which has one core."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        items = write_records(root / "images", Album(LEARNED_FROM), 120, seed=5, size=104)
        rounds = []
        for number in range(3):
            one = _processes(root / f"one-{number}", items, steps, records, 1)
            two = _processes(root / f"two-{number}", items, steps, records, 2)
            rounds.append((one, two))
    return {
        "one_images_per_s": spread([one for one, _ in rounds], 1),
        "two_images_per_s": spread([two for _, two in rounds], 1),
        "ratio": spread([two / one for one, two in rounds]),
    }


def _processes(directory: Path, items: list[Any], steps: int, records: int, count: int) -> float:
    settings = TrainingSettings(epochs=1, steps_per_epoch=steps, records=records, loader_processes=0)
    job = TrainingJob(name="bench", encoder=MINIATURE, settings=settings, device="cpu", evaluated_items=8)
    write_job(directory, job, items[:200], items[200:])
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    # Its threads that prepare views would take the core that a second process has to share with nobody.
    pinned = ["-c", _ON_ONE_CORE, sys.executable] if count == 1 else []
    command = [
        sys.executable,
        *pinned,
        *several,
        "-m",
        "code_worker.training.fitting.training_process",
        str(directory),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    return float(json.loads((directory / "progress.json").read_text())["images_per_s"])


if __name__ == "__main__":
    main()
