"""Who judges files: ours, the published pipeline over a DataLoader, and a plain loop; each a process of its own.

A contestant is started once, told by JSON lines on its standard input which files to judge, and answers with seconds
and labels. While it waits it costs nothing, and what it takes to start is nobody's figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from code_worker.types import Verdict

__all__ = ["CONTESTANTS", "Contestant", "PublishedModel", "label_of"]

BATCH = 32
CONTESTANTS = ("ours", "published-0", "published-2", "loop")
HEAD = "linear_tot_classifier_epoch-32.sav"
Judged = tuple[float, list[int]]


class Contestant:
    """A child process that judges files when told to."""

    def __init__(self, name: str, model: Path) -> None:
        command = [sys.executable, "-m", "bench.contestants", name, str(model)]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def judge(self, paths: Sequence[Path | str]) -> Judged:
        """Seconds from the first file to the last label, and the labels: 1 is fake. Ours takes URIs as well.

        Raises:
            RuntimeError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(path) for path in paths]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait(60)}")
        found = json.loads(answer)
        return float(found["seconds"]), list(found["labels"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


class PublishedModel:
    """The published form as its users load it: torchvision's transforms, transformers' ViTModel, a pickled head."""

    def __init__(self, directory: Path) -> None:
        import joblib
        import torch
        from torchvision import transforms
        from transformers import ViTModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._torch = torch
        self._model = ViTModel.from_pretrained(directory).eval()
        self._head = joblib.load(directory / "sklearn" / HEAD)
        self.transform = transforms.Compose(
            [
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            ]
        )

    def labels(self, batch: Any) -> list[int]:
        """`(n, 3, 224, 224) float32` to labels."""
        with self._torch.inference_mode():
            rows = self._model(batch).last_hidden_state[:, 0].numpy()
        return [int(label) for label in self._head.predict(rows)]


def label_of(verdict: Verdict | None) -> int:
    """1 is fake.

    Raises:
        RuntimeError: the image was not judged.
    """
    if verdict is None or verdict.label is None:
        raise RuntimeError(f"an image was not judged: {verdict}")
    return int(verdict.label == "fake")


def ours(stack: ExitStack, model: Path) -> Callable[[list[str]], Judged]:
    """`scan` with the release that importing the published form gives, with the settings a worker has."""
    from code_worker.cli.common.release_runtime import start
    from code_worker.moderation.scan import scan
    from code_worker.plugins import load_plugins
    from code_worker.releases.importing import build_release
    from code_worker.settings import FileSettings, Settings

    settings = Settings(files=FileSettings(roots=(Path("/"),)))
    built = model.parent / "release"
    if not built.exists():
        build_release(str(model), load_plugins(settings), built)
    ready = stack.enter_context(start(settings, str(built)))

    def judge(paths: list[str]) -> Judged:
        began = time.perf_counter()
        labels = [label_of(one) for one in scan(paths, ready.judge, ready.runtime, ready.policies)]
        return time.perf_counter() - began, labels

    return judge


def published(model: Path, workers: int) -> Callable[[list[str]], Judged]:
    """A loop over a DataLoader; its worker processes are started for the warm-up and kept."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    loaded = PublishedModel(model)

    class Files(Dataset[Any]):
        def __init__(self, names: list[str]) -> None:
            self.names = names

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, index: int) -> Any:
            return loaded.transform(Image.open(self.names[index]).convert("RGB"))

    def judge(paths: list[str]) -> Judged:
        chosen: list[int] = list(range(min(len(paths), BATCH)))
        loader = DataLoader(
            Files(paths), batch_size=BATCH, sampler=chosen, num_workers=workers, persistent_workers=workers > 0
        )

        def labels() -> Iterator[int]:
            for batch in loader:
                yield from loaded.labels(batch)

        list(labels())
        chosen[:] = range(len(paths))
        began = time.perf_counter()
        found = list(labels())
        return time.perf_counter() - began, found

    return judge


def loop(model: Path) -> Callable[[list[str]], Judged]:
    """One image after the other."""
    from PIL import Image

    loaded = PublishedModel(model)

    def judge(paths: list[str]) -> Judged:
        began = time.perf_counter()
        labels = [loaded.labels(loaded.transform(Image.open(path).convert("RGB"))[None])[0] for path in paths]
        return time.perf_counter() - began, labels

    return judge


def main() -> None:
    """The child process: one answer per line, until the parent closes the pipe."""
    parser = argparse.ArgumentParser(prog="bench.contestants")
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("model", type=Path)
    chosen = parser.parse_args()
    # What libraries print must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with ExitStack() as stack:
        stack.enter_context(closing(answers))
        if chosen.name == "ours":
            judge = ours(stack, chosen.model)
        elif chosen.name == "loop":
            judge = loop(chosen.model)
        else:
            judge = published(chosen.model, int(chosen.name.removeprefix("published-")))
        for line in sys.stdin:
            seconds, labels = judge(json.loads(line))
            answers.write(json.dumps({"seconds": seconds, "labels": labels}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
