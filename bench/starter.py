"""The starter encoder: a miniature that two cores train on toy records, for the demonstration and for tests.

`python -m bench.starter DIRECTORY` writes records, trains (or resumes), and writes encoder and report into
`code_worker/demo/starter`; it takes about an hour on one core. `--full` trains ViT-Tiny on the same recipe, for which
a GPU is wanted, and keeps the result in the directory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.photographs import HELD_OUT, LEARNED_FROM, Album
from bench.toy_data import write_records
from code_worker.demo.toy_images import GENERATORS
from code_worker.settings import TrainingSettings
from code_worker.training.fitting.job import VALIDATION_FILE, TrainingJob, read_items, write_job

HOME = Path(__file__).parents[1] / "code_worker" / "demo" / "starter"
RECORDS, HELD_OUT_RECORDS = 6000, 600
MINIATURE: dict[str, Any] = {
    "image_size": 48,
    "patch_size": 8,
    "width": 128,
    "depth": 3,
    "heads": 4,
    "mlp_width": 384,
}


def job(*, full: bool) -> TrainingJob:
    """The recipe."""
    settings = TrainingSettings(
        epochs=18,
        steps_per_epoch=100,
        records=48,
        learning_rate=1e-3,
        warmup_epochs=0.5,
        patience=18,
        seed=1,
        from_scratch=True,
        native=True,
    )
    if full:
        return TrainingJob(name="starter-full", settings=settings)
    return TrainingJob(name="starter", encoder=MINIATURE, start="cosine", settings=settings)


def prepare(directory: Path, *, full: bool) -> None:
    """Writes the records and the job, unless they are there."""
    if (directory / "job.json").is_file():
        return
    size = 288 if full else 104
    train = write_records(directory / "train", Album(LEARNED_FROM), RECORDS, seed=11, size=size)
    held_out = write_records(directory / "held-out", Album(HELD_OUT), HELD_OUT_RECORDS, seed=12, size=size)
    write_job(directory, job(full=full), train, held_out)


def main() -> None:
    """Trains and keeps what came of it."""
    parser = argparse.ArgumentParser(prog="bench.starter")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--full", action="store_true", help="ViT-Tiny instead of the miniature.")
    arguments = parser.parse_args()
    prepare(arguments.directory, full=arguments.full)
    began = time.monotonic()
    command = [sys.executable, "-m", "code_worker.training.fitting.training_process", str(arguments.directory)]
    if status := subprocess.run(command, check=False).returncode:
        raise SystemExit(f"training ended with status {status}; see {arguments.directory}")
    print(f"{time.monotonic() - began:.0f} s")
    if not arguments.full:
        keep(arguments.directory)


def keep(directory: Path) -> None:
    """Copies the encoder and writes the report beside it: recipe, seed, curve."""
    HOME.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        (HOME / "encoder").mkdir(exist_ok=True)
        shutil.copyfile(directory / "result" / "encoder" / name, HOME / "encoder" / name)
    report = json.loads((directory / "result" / "report.json").read_text(encoding="utf-8"))
    report["recipe"] = {
        "records": len(read_items(directory / "train.jsonl")) // 2,
        "held_out_records": len(read_items(directory / VALIDATION_FILE)) // 2,
        "generators": list(GENERATORS),
        "learned_from": LEARNED_FROM,
        "held_out": HELD_OUT,
        "encoder": MINIATURE,
    }
    (HOME / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
