"""Nearest neighbour, ours against scikit-learn's: 100,000 references, 128 queries, alternating rounds.

    python bench/knn.py [--references 100000] [--queries 128] [--rounds 15]

Both use as many threads as they like. A round times one then the other; the ratio is taken within each round, so
that a machine that slows down slows both. Labels must be equal, or the program fails.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from code_worker_heads.knn import NearestNeighbourHead


def timed_ms(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds that `work` takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    return (time.perf_counter() - start) * 1e3, result


def summary(name: str, values: list[float], unit: str) -> str:
    """One line: median and range."""
    return f"{name:<22} median {statistics.median(values):8.2f}{unit}   range {min(values):.2f} – {max(values):.2f}"


def main() -> None:
    """Runs the rounds and prints medians, ranges and the ratio within a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--references", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    references = rng.normal(size=(chosen.references, 192)).astype(np.float32)
    labels = rng.integers(0, 2, chosen.references).astype(np.int8)
    queries = rng.normal(size=(chosen.queries, 192)).astype(np.float32)
    ours = NearestNeighbourHead().fit(references, labels)
    theirs = KNeighborsClassifier(n_neighbors=1, metric="cosine", n_jobs=-1).fit(references, labels)
    ours_ms, theirs_ms = [], []
    for number in range(chosen.rounds + 1):
        pair = [lambda: timed_ms(lambda: ours.score(queries)), lambda: timed_ms(lambda: theirs.predict(queries))]
        order = (0, 1) if number % 2 else (1, 0)
        done = {which: pair[which]() for which in order}
        if not np.array_equal(done[0][1] >= 0.5, done[1][1] == 1):
            raise SystemExit("labels differ")
        if number:  # the first round warms caches and threads
            ours_ms.append(done[0][0])
            theirs_ms.append(done[1][0])
    print(f"{chosen.references} references, {chosen.queries} queries, {chosen.rounds} rounds, {os.cpu_count()} CPUs")
    print(summary("code_worker knn", ours_ms, " ms"))
    print(summary("scikit-learn", theirs_ms, " ms"))
    print(summary("ratio within a round", [b / a for a, b in zip(ours_ms, theirs_ms, strict=True)], "x "))
    print("labels equal in every round")


if __name__ == "__main__":
    main()
