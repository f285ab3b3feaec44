"""Adaptation: a generator that the starter misses, 200 labels of it, one retrain; refit alone beside it.

`python -m bench.adaptation DIRECTORY [--generator toy-dotted]` builds a deployment of its own in DIRECTORY
(SQLite, files), imports a release of the starter whose heads are fitted on the old generators, labels, runs the same
`Learner` as a schedule does, and measures champion and candidate on photographs of which nothing was learned.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.photographs import HELD_OUT, LEARNED_FROM, Album
from bench.toy_data import write_records
from code_worker.data.labelling import Labeller
from code_worker.demo.starter_release import build_starter_release
from code_worker.demo.toy_images import GENERATORS, NEWCOMERS
from code_worker.encoder.torch_engine import Engine
from code_worker.images.decode import decode
from code_worker.plugins import load_plugins
from code_worker.releases.registry import Registry, open_registry
from code_worker.settings import Settings, load_settings
from code_worker.store import migrate
from code_worker.store.engine import Store, open_store
from code_worker.store.learning import image_groups
from code_worker.training.fitting.job import Item
from code_worker.training.learner import Learner

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE = 232
OLD_RECORDS, NEW_RECORDS, MEASURED = 1000, 100, 480


def main() -> None:
    """Runs it and prints a table and JSON."""
    parser = argparse.ArgumentParser(prog="bench.adaptation")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--generator", choices=list(NEWCOMERS), default="toy-dotted")
    parser.add_argument("--kind", choices=["retrain", "refit"], action="append")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update(
        CODE_WORKER_DATA_DIR=str(arguments.directory / "data"),
        CODE_WORKER_FILES__ROOTS=json.dumps([str(arguments.directory)]),
        CODE_WORKER_LOG_LEVEL="warning",
    )
    settings = load_settings()
    with closing(open_store(settings.resolved_database_url)) as store:
        migrate.upgrade(store)
        found = run(arguments.directory, arguments.generator, arguments.kind or ["refit", "retrain"], settings, store)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run(directory: Path, generator: str, kinds: Iterable[str], settings: Settings, store: Store) -> dict[str, Any]:
    """Labels, learns, measures."""
    plugins = load_plugins(settings)
    registry = open_registry(settings, store=store, plugins=plugins)
    learned, held_out = Album(LEARNED_FROM), Album(HELD_OUT)
    old = write_records(directory / "old", learned, OLD_RECORDS, seed=21, size=SIZE)
    new = write_records(
        directory / "new", learned, NEW_RECORDS, seed=22, size=SIZE, generators={generator: NEWCOMERS[generator]}
    )
    everyone = {**GENERATORS, generator: NEWCOMERS[generator]}
    measured = write_records(
        directory / "measured", held_out, MEASURED * len(everyone), seed=23, size=SIZE, generators=everyone
    )
    with closing(Labeller(settings, store)) as labeller:
        for item in [*old, *new]:
            labeller.label(item.path, "fake" if item.label else "real", generator=item.generator, by="bench")
    places = store.run(lambda session: image_groups.places(session, [item.sha256 for item in old]), write=False)
    release = directory / "release"
    # Fitted on the hold-out too, the champion would be asked what it learned by heart.
    taught = [item for item in old if places[item.sha256].split != "holdout"]
    build_starter_release(release, *_crops(taught, settings), plugins)
    champion = registry.add(release)
    registry.promote(champion, by="bench")
    found: dict[str, Any] = {"generator": generator, "before": _accuracies(registry, champion, measured, settings)}
    for kind in kinds:
        began = time.monotonic()
        run = Learner(settings, store, plugins=plugins).learn(kind, by="bench", force=True)
        assert run is not None
        judged_by = run.candidate or champion
        found[kind] = {
            "state": run.state,
            "reasons": run.reasons,
            "seconds": round(time.monotonic() - began, 1),
            "after": _accuracies(registry, judged_by, measured, settings),
        }
        # Each kind begins from the starter.
        registry.promote(champion, by="bench")
    return found


def _crops(items: list[Item], settings: Settings) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    crops = [decode(Path(item.path).read_bytes(), settings.limits)[0] for item in items]
    return np.stack(crops), np.array([item.label for item in items], np.int8)


def _accuracies(registry: Registry, release: str, items: list[Item], settings: Settings) -> dict[str, float]:
    """Accuracy of the default head on real images, and balanced accuracy for each generator."""
    loaded = registry.load(release)
    engine = Engine(loaded.weights, device="cpu")
    crops, labels = _crops(items, settings)
    embeddings = np.concatenate([engine.embed(crops[i : i + 64]) for i in range(0, len(crops), 64)])
    head = loaded.heads[loaded.manifest.default_head or "linear"]
    right = (head.score(embeddings) >= 0.5) == (labels == 1)
    real = float(right[labels == 0].mean())
    names = np.array([item.generator or "real" for item in items])
    by_name = {name: (real + float(right[names == name].mean())) / 2 for name in sorted(set(names) - {"real"})}
    return {"real": round(real, 4), **{name: round(value, 4) for name, value in by_name.items()}}


if __name__ == "__main__":
    main()
