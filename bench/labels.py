"""What labels cost: a retrain's own steps beside the training, with 10³ to 10⁵ labelled images on PostgreSQL.

    python -m bench.labels [--sizes 1000 10000 100000] [--heads linear knn svm] [--svm-most 20000] [--json FILE]

Every image has one label, a kept copy and a known embedding (clouds about 200 centres). Milliseconds per 1,000
labels; a step that grows no faster than the labels keeps its figure. The one-class SVM is fitted up to `--svm-most`:
libsvm's time grows with the square.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.heads import clouds
from bench.postgres import ledger, postgres
from bench.rounds import machine, print_table, write_json
from code_worker.plugins import load_plugins
from code_worker.settings import Settings
from code_worker.store import embeddings
from code_worker.store.engine import Session, Store
from code_worker.store.learning import kept_images, labels
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.labels import NewLabel
from code_worker.training import snapshot
from code_worker.wire import chunks

ENCODER = "e" * 64


def main() -> None:
    """Labels, measures, prints."""
    parser = argparse.ArgumentParser(prog="bench.labels")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--heads", nargs="+", default=["linear", "knn", "svm"])
    parser.add_argument("--svm-most", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found: dict[str, dict[int, float]] = {}
    with postgres() as server, ledger(server.new_database()) as store:
        before = 0
        for size in sorted(chosen.sizes):
            steps: dict[str, Callable[[], Any]] = {"label": partial(say, store, before, size), **reading(store, size)}
            heads = [name for name in chosen.heads if name != "svm" or size <= chosen.svm_most]
            for name, work in (steps | fitting(heads, size)).items():
                counted = size - before if name == "label" else size
                found.setdefault(name, {})[size] = round(timed_ms(work) * 1000 / counted, 2)
            before = size
    titles = ("ms per 1,000 labels", *map(str, sorted(chosen.sizes)))
    print_table(
        titles, [(name, *(row.get(size, "") for size in sorted(chosen.sizes))) for name, row in found.items()]
    )
    write_json(chosen.json, {"machine": machine(), "ms_per_1000": found})


def timed_ms(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def say(store: Store, first: int, last: int) -> None:
    """Labels images, notes their copies and keeps their embeddings, a thousand to a transaction."""
    vectors, truth = clouds(last - first, seed=first)
    for numbers in chunks(range(first, last), 1000):
        hashes = [sha256(number) for number in numbers]
        new = [
            NewLabel(one, ("real", "fake")[truth[number - first]], by="bench", source="cli", from_file=True)
            for number, one in zip(numbers, hashes, strict=True)
        ]
        copies = [KeptImage(one, 1000, "jpeg", 640, 480, f"s3://photographs/{one}") for one in hashes]
        known = {
            one: vectors[number - first].astype("<f4").tobytes() for number, one in zip(numbers, hashes, strict=True)
        }
        store.run(partial(_write, new=new, copies=copies, known=known))


def _write(session: Session, new: list[NewLabel], copies: list[KeptImage], known: dict[str, bytes]) -> None:
    labels.add(session, new)
    kept_images.note_kept(session, copies)
    embeddings.keep(session, ENCODER, known)


def reading(store: Store, size: int) -> dict[str, Callable[[], Any]]:
    """What a run reads and writes before it fits anything."""
    hashes = [sha256(number) for number in range(size)]
    settings = Settings().labels
    return {
        "snapshot": lambda: store.run(lambda session: snapshot.take(session, settings), write=False),
        "freeze": lambda: store.run(lambda session: snapshot.freeze(session, snapshot.take(session, settings))),
        "embeddings": lambda: store.run(lambda session: embeddings.known(session, ENCODER, hashes), write=False),
    }


def fitting(names: list[str], size: int) -> dict[str, Callable[[], Any]]:
    """Each head fitted on so many embeddings, the one-class one on the reals among them."""
    plugins = load_plugins(Settings())
    vectors, truth = clouds(size, seed=1)

    def fit(name: str) -> object:
        head = plugins.head_class(name)
        rows = truth == 0 if head.one_class else np.ones(size, dtype=np.bool_)
        return head().fit(vectors[rows], truth[rows])

    return {f"fit {name}": partial(fit, name) for name in names}


def sha256(number: int) -> str:
    """Content hash of an image that there is not."""
    return hashlib.sha256(str(number).encode()).hexdigest()


if __name__ == "__main__":
    main()
