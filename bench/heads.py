"""Heads beside scikit-learn: batches of 128 queries, alternating rounds, equal labels.

    python -m bench.heads [--queries 128] [--references 100000 1000000] [--rounds 9] [--graph] [--json FILE]

Both sides use as many threads as they like. With `--graph` and `code-worker-faiss` installed, its head is shown
beside the exact one at the largest number of references, with the recall that it measured and the labels that differ.
Embeddings are Gaussian clouds about 200 centres, as random as the seed: speed hardly depends on them, recall does.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import OneClassSVM

from bench.rounds import alternate, compared, print_table, rows_of, write_json
from code_worker_heads.knn import NearestNeighbourHead
from code_worker_heads.linear import LinearHead
from code_worker_heads.svm import OneClassSvmHead

LEARNT: Final = 4000
KNN_BARS: Final = {100_000: 5.0, 1_000_000: 4.5}
LEAST_S: Final = 0.02
"""A figure is taken over calls that last at least so long together."""

Work = dict[str, Callable[[], NDArray[np.bool_]]]


def clouds(rows: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Embeddings `(rows, 192)` about 200 centres, and a label for each `(rows,)`; a label goes with its centre."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(200, 192)).astype(np.float32)
    chosen = rng.integers(0, len(centres), rows)
    return centres[chosen] + rng.standard_normal((rows, 192), dtype=np.float32), (chosen % 2).astype(np.int8)


def linear(queries: NDArray[np.float32]) -> Work:
    """Logistic regression as published."""
    rows, labels = clouds(LEARNT, 1)
    ours = LinearHead().fit(rows, labels)
    theirs = LogisticRegression(C=0.316, class_weight="balanced", max_iter=1500, random_state=0).fit(rows, labels)
    return {"ours": lambda: ours.score(queries) >= 0.5, "scikit-learn": lambda: theirs.predict(queries) == 1}


def svm(queries: NDArray[np.float32]) -> Work:
    """One-class SVM as published."""
    rows, labels = clouds(2 * LEARNT, 2)
    real = rows[labels == 0]
    ours = OneClassSvmHead().fit(real, np.zeros(len(real), dtype=np.int8))
    theirs = OneClassSVM(nu=0.1, kernel="poly", gamma="auto").fit(real)
    return {"ours": lambda: ours.score(queries) >= 0.5, "scikit-learn": lambda: theirs.predict(queries) == -1}


def neighbours(queries: NDArray[np.float32], references: int) -> Work:
    """The nearest of so many references, exactly."""
    rows, labels = clouds(references, 3)
    ours = NearestNeighbourHead().fit(rows, labels)
    theirs = KNeighborsClassifier(n_neighbors=1, metric="cosine", n_jobs=-1).fit(rows, labels)
    return {"ours": lambda: ours.score(queries) >= 0.5, "scikit-learn": lambda: theirs.predict(queries) == 1}


def graph(queries: NDArray[np.float32], references: int) -> tuple[Work, dict[str, Any]]:
    """The graph beside the exact search, and what fitting it measured."""
    from code_worker_faiss.head import HnswHead

    rows, labels = clouds(references, 3)
    exact = NearestNeighbourHead().fit(rows, labels)
    start = time.perf_counter()
    near = HnswHead({"threads": os.cpu_count() or 1}).fit(rows, labels)
    facts = {"fit_s": round(time.perf_counter() - start, 1), "recall": round(near.recall, 4)}
    work: Work = {"knn-faiss": lambda: near.score(queries) >= 0.5, "knn": lambda: exact.score(queries) >= 0.5}
    return work, facts


def rate(work: Callable[[], Any], queries: int) -> float:
    """Queries per second."""
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < LEAST_S or not calls:
        work()
        calls += 1
    return queries * calls / elapsed


def measured(work: Work, queries: int, rounds: int, bar: float | None) -> dict[str, Any]:
    """Rates and ratios of the two; the first named is ours."""
    ours, other = work
    rates = alternate((ours, other), rounds, lambda name: rate(work[name], queries))
    return compared(rates, ours, {} if bar is None else {other: bar})


def against_scikit_learn(
    queries: NDArray[np.float32], references: list[int], rounds: int
) -> dict[str, dict[str, Any]]:
    """Figures per head; ends the program where a label differs."""
    parts: dict[str, tuple[Callable[[], Work], float | None]] = {
        "linear": (lambda: linear(queries), 10),
        "svm": (lambda: svm(queries), 4),
    }
    for count in references:
        parts[f"knn {count}"] = (partial(neighbours, queries, count), KNN_BARS.get(count))
    found = {}
    for name, (make, bar) in parts.items():
        work = make()
        labels = [call() for call in work.values()]
        if not np.array_equal(labels[0], labels[1]):
            raise SystemExit(f"{name}: {int((labels[0] != labels[1]).sum())} labels differ from scikit-learn's")
        found[name] = measured(work, len(queries), rounds, bar)
    return found


def main() -> None:
    """Measures, prints a table, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--references", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--graph", action="store_true", help="knn-faiss too; building a graph takes minutes")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    queries, _ = clouds(chosen.queries, 4)
    found = against_scikit_learn(queries, chosen.references, chosen.rounds)
    if chosen.graph:
        if importlib.util.find_spec("code_worker_faiss") is None:
            raise SystemExit("--graph needs code-worker-faiss: pip install ./plugins/faiss_head")
        work, facts = graph(queries, max(chosen.references, default=LEARNT))
        exact, near = work["knn"](), work["knn-faiss"]()
        found["knn-faiss"] = measured(work, len(queries), chosen.rounds, None)
        facts["labels_differ"] = int((exact != near).sum())
    rows = [row for name, figures in found.items() for row in rows_of(name, figures)]
    print_table(("head", "by", "queries/s", "ours is times", "bar"), rows)
    if chosen.graph:
        print(f"knn-faiss: {', '.join(f'{name} {value}' for name, value in facts.items())}")
        found["knn-faiss"] |= facts
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
