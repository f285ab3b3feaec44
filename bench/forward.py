"""`python -m bench.forward`: what share of the processor's matrix rate the forward pass reaches, by engine.

Streams of one thread each, as workers run them. The share is taken of GFLOP per second of processor time, which other
processes on the machine disturb little; beside it stands the share of wall time, which falls when they are busy.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.rounds import alternate, print_table, ratios, spread, write_json
from code_worker.encoder.engines import open_engine
from code_worker.encoder.loop import BatchEncoder
from code_worker.encoder.weights import random_weights

__all__ = ["EXECUTED_GFLOP", "NOMINAL_GFLOP"]

# ViT-Tiny/16 at 224: 12 blocks of 204.1 MFLOP, and 57.8 for the patches; the CLS-only last block leaves out 175.
NOMINAL_GFLOP = 2.507
EXECUTED_GFLOP = 2.332
BAR = 0.75
ENGINES = ("torch", "openvino")
# Rows, depth and columns: a micro-batch of 8 through the model's products, and two large ones.
GEMMS = {
    "qkv": (1576, 192, 576),
    "mlp up": (1576, 192, 768),
    "mlp down": (1576, 768, 192),
    "square 1024": (1024, 1024, 1024),
    "square 2048": (2048, 2048, 2048),
}

Work = Callable[[], float]
"""Does one piece of work and says how many GFLOP it was."""


def main() -> None:
    """Measures, prints and writes."""
    arguments = _arguments()
    works = _works(arguments.micro_batches)
    for work in works.values():
        work()()
    wall: dict[str, list[float]] = {name: [] for name in works}

    def measure(name: str) -> float:
        by_wall, by_processor = _rates(works[name], arguments.streams, arguments.seconds)
        wall[name].append(by_wall)
        return by_processor

    rates = alternate(list(works), arguments.rounds, measure)
    found = _found(rates, wall)
    found["setup"] = {"streams": arguments.streams, "rounds": arguments.rounds, "torch": torch.__version__}
    _print(found)
    write_json(arguments.json, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=len(os.sched_getaffinity(0)), help="threads, one core each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="per contestant and round")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _works(micro_batches: Sequence[int]) -> dict[str, Callable[[], Work]]:
    works: dict[str, Callable[[], Work]] = {name: _gemm(*sizes) for name, sizes in GEMMS.items()}
    for name in ENGINES:
        engine = open_engine(random_weights(0), device="cpu", engine=name)
        works |= {f"{name} {size}": _forward(engine, size) for size in micro_batches}
    return works


def _gemm(rows: int, depth: int, columns: int) -> Callable[[], Work]:
    left, right = torch.randn(rows, depth), torch.randn(depth, columns)

    def start() -> Work:
        out = torch.empty(rows, columns)

        def work() -> float:
            torch.mm(left, right, out=out)
            return 2 * rows * depth * columns / 1e9

        return work

    return start


def _forward(engine: BatchEncoder, size: int) -> Callable[[], Work]:
    crops = np.random.default_rng(0).integers(0, 256, (size, 224, 224, 3), dtype=np.uint8)

    def work() -> float:
        engine.embed(crops)
        return size * NOMINAL_GFLOP

    return lambda: work


def _rates(start: Callable[[], Work], streams: int, seconds: float) -> tuple[float, float]:
    """GFLOP of `streams` threads together per second of wall time, and as if each had its core for itself."""
    done, busy = [0.0] * streams, [0.0] * streams
    gate = threading.Barrier(streams + 1)

    def run(number: int) -> None:
        torch.set_num_threads(1)
        work = start()
        work()
        gate.wait()
        deadline, begun = time.perf_counter() + seconds, time.thread_time()
        while time.perf_counter() < deadline:
            done[number] += work()
        busy[number] = time.thread_time() - begun

    threads = [threading.Thread(target=run, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started), sum(map(truediv, done, busy))


def _found(rates: Mapping[str, Sequence[float]], wall: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The peak is the best product of each round: a slower machine slows both sides of the ratio.

    OpenVINO's threads are its own, so what the calling threads burn says nothing of it: it has wall time alone.
    """
    peak, wall_peak = (
        [max(values) for values in zip(*(figures[name] for name in GEMMS), strict=True)] for figures in (rates, wall)
    )
    forward = {}
    for name in (name for name in rates if name not in GEMMS):
        of_wall = ratios(wall[name], wall_peak)
        nominal = of_wall if name.startswith("openvino") else ratios(rates[name], peak)
        forward[name] = {
            "images_per_s": spread([rate / NOMINAL_GFLOP for rate in wall[name]], 1),
            "times_torch_8": spread(ratios(wall[name], wall.get("torch 8", wall[name])), 2),
            "share_of_wall": spread(of_wall, 3),
            "share": spread(nominal, 3),
            "share_executed": spread([share * EXECUTED_GFLOP / NOMINAL_GFLOP for share in nominal], 3),
        }
    return {"gemm": {name: spread(rates[name], 1) for name in GEMMS}, "peak": spread(peak, 1), "forward": forward}


def _print(found: Mapping[str, Any]) -> None:
    def text(figures: Mapping[str, float]) -> str:
        return f"{figures['median']} ({figures['least']} to {figures['most']})"

    print_table(("product", "GFLOP/s"), [(name, text(rate)) for name, rate in found["gemm"].items()])
    print(f"peak of each round: {text(found['peak'])} GFLOP/s\n")
    print_table(
        (
            "engine and micro-batch",
            "images/s",
            "times torch 8",
            f"share at {NOMINAL_GFLOP}",
            f"at {EXECUTED_GFLOP} executed",
            "by wall",
            "bar",
        ),
        [
            (
                size,
                text(row["images_per_s"]),
                text(row["times_torch_8"]),
                text(row["share"]),
                text(row["share_executed"]),
                text(row["share_of_wall"]),
                f"≥ {BAR}: {'met' if row['share']['median'] >= BAR else 'MISSED'}",
            )
            for size, row in found["forward"].items()
        ],
    )


if __name__ == "__main__":
    main()
