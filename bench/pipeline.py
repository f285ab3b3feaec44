"""Files to verdicts: `scan` beside the published pipeline, in alternating rounds on the same images.

    python -m bench.pipeline [--kind 640x480-jpeg …] [--rounds 5] [--images N] [--quick] [--json FILE]

The published pipeline is a loop over a torch DataLoader (Pillow; torchvision CenterCrop, ToTensor, Normalize; 0 or
2 worker processes), transformers' ViTModel and scikit-learn's LogisticRegression, with torch's own number of threads;
beside it the same without a loader, image by image, as a script would. All are warm before the first round. Labels
must be equal in all runs, or the program fails. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.contestants import CONTESTANTS, Contestant
from bench.images import FORMS, SIZES, Kind, make_images
from bench.rounds import alternate, compared, print_table, rows_of, write_json

BARS = {
    "640x480-jpeg": 1.8,
    "1024x1024-jpeg": 1.95,
    "1920x1080-jpeg": 2.2,
    "4000x3000-jpeg": 6.0,
    "640x480-png": 1.75,
    "1920x1080-png": 2.5,
}
TITLES = ("images", "contestant", "images/s", "ours is … times as fast", "bar")


def images_for(kind: Kind) -> int:
    """As many as take the slowest contestant a few seconds."""
    megapixels = kind.width * kind.height / 1e6
    return 160 if megapixels < 1 else 96 if megapixels < 4 else 32


def bar_of(kind: Kind) -> dict[str, float]:
    """What ours must reach, against the better of the two settings of the published pipeline as against the other."""
    bar = BARS.get(str(kind))
    return {} if bar is None else {"published-0": bar, "published-2": bar}


def compare(
    contestants: Mapping[str, Contestant], kind: Kind, paths: Sequence[Path], rounds: int
) -> dict[str, dict[str, Any]]:
    """Figures of each contestant on the same files.

    Raises:
        SystemExit: two contestants say different things of one file.
    """
    expected = contestants["ours"].judge(paths)[1]
    if len(expected) != len(paths) or set(expected) != {0, 1}:
        raise SystemExit(f"{kind}: labels that tell nothing apart: {expected}")

    def measure(name: str) -> float:
        seconds, labels = contestants[name].judge(paths)
        if labels != expected:
            differing = sum(one != other for one, other in zip(labels, expected, strict=True))
            raise SystemExit(f"{kind}: {name} labels {differing} of {len(paths)} images differently")
        return len(paths) / seconds

    for name, contestant in contestants.items():
        if name != "ours":
            contestant.judge(paths[:8])
    return compared(alternate(list(contestants), rounds, measure), "ours", bar_of(kind))


def published_model(directory: Path) -> Path:
    """A checkpoint in the published form with random weights, below a directory, made unless it is there."""
    from tests.parity import build_parity_set

    model = directory / "set" / "published"
    if not model.exists():
        (directory / "set").mkdir(parents=True)
        build_parity_set(directory / "set")
    return model


@contextmanager
def started(directory: Path, names: Sequence[str] = CONTESTANTS) -> Iterator[dict[str, Contestant]]:
    """The contestants, on one model that is made for them."""
    model = published_model(directory)
    with ExitStack() as stack:
        yield {name: stack.enter_context(Contestant(name, model)) for name in names}


def run(directory: Path, kinds: Sequence[Kind], rounds: int, images: int | None) -> dict[str, Any]:
    """Prints and returns the figures of every kind."""
    found: dict[str, Any] = {}
    with started(directory) as contestants:
        for kind in kinds:
            paths = make_images(directory / str(kind), kind, images or images_for(kind))
            mean_bytes = sum(path.stat().st_size for path in paths) // len(paths)
            figures = compare(contestants, kind, paths, rounds)
            found[str(kind)] = {"images": len(paths), "mean_bytes": mean_bytes, "rounds": rounds, **figures}
            label = f"{kind} ({len(paths)} of {mean_bytes // 1000} kB)"
            print_table(TITLES, list(rows_of(label, figures)))
    return found


def main() -> None:
    """Makes the images and the model, runs the rounds, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", type=Kind.parse, action="append", help="WxH-FORM; again for more; unset: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, help="of each kind; unset: by size, so that a run takes seconds")
    parser.add_argument("--quick", action="store_true", help="one kind, few images, two rounds")
    parser.add_argument("--directory", type=Path, help="keep images and model here for the next time")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    kinds = chosen.kind or [Kind(*size, form) for form in FORMS for size in SIZES]
    rounds, images = chosen.rounds, chosen.images
    if chosen.quick:
        kinds, rounds, images = (chosen.kind or [Kind.parse("640x480-jpeg")]), 2, 24
    with tempfile.TemporaryDirectory() as temporary:
        write_json(chosen.json, run(chosen.directory or Path(temporary), kinds, rounds, images))


if __name__ == "__main__":
    main()
