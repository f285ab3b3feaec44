"""Files to verdicts: `scan` against the published pipeline, in alternating rounds on the same images.

    python -m bench.pipeline [--images 160] [--rounds 5] [--size 640x480] [--format JPEG]

The published pipeline is a loop over a torch DataLoader (Pillow; torchvision CenterCrop, ToTensor, Normalize; 0 or
2 worker processes), transformers' ViTModel and scikit-learn's LogisticRegression, with torch's own number of threads.
Every run is a process of its own, times only the images (after a warm-up batch) and prints its labels, which must be
equal in all runs. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH = 32
CONTESTANTS = ("ours", "published-0", "published-2")


def make_images(directory: Path, count: int, size: tuple[int, int], form: str) -> None:
    """Crops of the photographs that scikit-learn ships, scaled and shifted so that no two are alike."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        box = rng.integers(0, 80, 4)
        cut = photograph.crop((box[0], box[1], photograph.width - box[2], photograph.height - box[3]))
        options: dict[str, Any] = {"quality": 88} if form == "JPEG" else {}
        cut.resize(size, Image.Resampling.BICUBIC).save(directory / f"{number:05}.{form.lower()}", form, **options)


def ours(published: Path, paths: list[str]) -> tuple[float, list[int]]:
    """`scan` with the release that importing the published form gives."""
    from code_worker.images.source import Sources
    from code_worker.moderation.judge import Judge
    from code_worker.moderation.load import start_runtime
    from code_worker.moderation.policy import PolicyBook
    from code_worker.moderation.pool import PriorityPool
    from code_worker.moderation.scan import scan
    from code_worker.plugins import load_plugins
    from code_worker.releases.importer import build_release
    from code_worker.releases.loading import load_release
    from code_worker.settings import FileSettings, Settings

    settings = Settings(files=FileSettings(roots=(Path(paths[0]).parent,)))
    plugins = load_plugins(settings)
    built = published.parent / "release"
    if not built.exists():
        build_release(str(published), plugins, built)
    runtime = start_runtime(load_release(built, plugins), settings)
    with PriorityPool(settings.worker.fetch_threads) as pool:
        judge = Judge(sources=Sources(settings), pool=pool, limits=settings.limits)
        list(scan(paths[:BATCH], judge, runtime, PolicyBook()))
        start = time.perf_counter()
        labels = [int(verdict.label == "fake") for verdict in scan(paths, judge, runtime, PolicyBook())]
        seconds = time.perf_counter() - start
    runtime.embedder.close()
    return seconds, labels


def published(directory: Path, paths: list[str], workers: int) -> tuple[float, list[int]]:
    """The published pipeline as its users run it."""
    import joblib
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms
    from transformers import ViTModel

    transform = transforms.Compose(
        [
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )

    class Files(Dataset[torch.Tensor]):
        def __init__(self, names: list[str]) -> None:
            self.names = names

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(self.names[index]).convert("RGB"))  # type: ignore[no-any-return]

    model = ViTModel.from_pretrained(directory).eval()
    head = joblib.load(directory / "sklearn" / "linear_tot_classifier_epoch-32.sav")

    def labels(names: list[str]) -> Iterator[int]:
        with torch.inference_mode():
            for batch in DataLoader(Files(names), batch_size=BATCH, num_workers=workers):
                yield from head.predict(model(batch).last_hidden_state[:, 0].numpy()).tolist()

    list(labels(paths[:BATCH]))
    start = time.perf_counter()
    found = list(labels(paths))
    return time.perf_counter() - start, found


def run_one(contestant: str, directory: Path) -> None:
    """The child process: measures one contestant and prints its result."""
    paths = sorted(str(path) for path in (directory / "images").iterdir())
    model = directory / "published"
    if contestant == "ours":
        seconds, labels = ours(model, paths)
    else:
        seconds, labels = published(model, paths, int(contestant.removeprefix("published-")))
    print(json.dumps({"seconds": seconds, "images": len(paths), "labels": labels}))


def measure(contestant: str, directory: Path) -> dict[str, Any]:
    """Runs one contestant in a process of its own."""
    command = [sys.executable, "-m", "bench.pipeline", "--child", contestant, "--directory", str(directory)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def compare(directory: Path, rounds: int) -> dict[str, list[float]]:
    """Images per second of each contestant, one figure per round; refuses runs whose labels differ."""
    rates: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    expected: list[int] | None = None
    for number in range(rounds):
        order = CONTESTANTS if number % 2 else CONTESTANTS[::-1]
        for contestant in order:
            result = measure(contestant, directory)
            expected = expected or result["labels"]
            if result["labels"] != expected:
                raise SystemExit(f"{contestant}: labels differ")
            rates[contestant].append(result["images"] / result["seconds"])
    return rates


def report(rates: dict[str, list[float]]) -> None:
    """Medians, ranges, and the ratio of ours to each other within a round."""
    for name, values in rates.items():
        ratios = [own / other for own, other in zip(rates["ours"], values, strict=True)]
        print(
            f"{name:<14} {statistics.median(values):7.1f} images/s  ({min(values):.1f} to {max(values):.1f})   "
            f"ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    """Makes the images and the model, runs the rounds, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--format", default="JPEG", choices=["JPEG", "PNG", "WEBP"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_one(arguments.child, arguments.directory)
        return
    from tests.parity import build_parity_set

    width, height = (int(side) for side in arguments.size.split("x"))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        (directory / "images").mkdir()
        make_images(directory / "images", arguments.images, (width, height), arguments.format)
        build_parity_set(directory / "set").directory.rename(directory / "published")
        print(
            f"{arguments.images} images {arguments.size} {arguments.format}, {arguments.rounds} rounds, "
            f"Python {platform.python_version()}, {platform.machine()}"
        )
        report(compare(directory, arguments.rounds))


if __name__ == "__main__":
    main()
