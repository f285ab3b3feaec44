"""`python -m bench.gpu`: what an accelerator does with the encoder, against the limits that were measured on it.

Needs torch, timm, numpy, Pillow and this repository. Rates are medians and ranges over alternating rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.rounds import alternate, spread
from code_worker.encoder.forward import CropEncoder
from code_worker.encoder.loop import EncoderLoop
from code_worker.encoder.torch_engine import Engine, StreamPool, resolve_device
from code_worker.encoder.weights import random_weights
from code_worker.errors import ConfigurationError
from code_worker.images.decode import decode
from code_worker.releases.reference_scores import seeded_crops
from code_worker.settings import LimitSettings

GFLOP_OF_PATCHES, GFLOP_OF_BLOCK = 0.0578, 0.2041  # 2.507 per image with the published depth of 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("plain", "prepared")
_CROP_BYTES = 224 * 224 * 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how much of it."""

    device: str
    precisions: tuple[str, ...]
    modes: tuple[str, ...]
    batches: tuple[int, ...]
    depth: int
    rounds: int
    seconds: float
    matrix: int
    images: int

    @property
    def gflop(self) -> float:
        """Arithmetic of one image through the whole model."""
        return GFLOP_OF_PATCHES + self.depth * GFLOP_OF_BLOCK

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"


def main() -> int:
    """Measures, prints a table in markdown and writes it and the JSON; 2 when the device is not there."""
    arguments = _arguments()
    try:
        plan = _plan(arguments)
    except ConfigurationError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    found = measure(plan)
    text = markdown(found)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), help="unset: all on a GPU, fp32 on a CPU")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="unset: both on a GPU, plain on a CPU")
    parser.add_argument("--batches", nargs="+", type=int, help="powers of two from 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contestant and round")
    parser.add_argument("--images", type=int, default=20_000, help="images end to end")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes: shows that it works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def _plan(arguments: argparse.Namespace) -> Plan:
    device = resolve_device(arguments.device)
    cuda, tiny = device != "cpu", arguments.tiny
    batches = tuple(arguments.batches or ((8,) if tiny else (8, 16, 32, 64, 128, 256, 512)))
    if any(batch < 8 or batch & (batch - 1) for batch in batches):
        raise ConfigurationError(f"--batches {' '.join(map(str, batches))}: powers of two from 8 on")
    return Plan(
        device=device,
        precisions=tuple(arguments.precisions or (DTYPES if cuda else ("fp32",))),
        modes=tuple(arguments.modes or (MODES if cuda else ("plain",))),
        batches=batches,
        depth=2 if tiny else 12,
        rounds=1 if tiny else arguments.rounds,
        seconds=0.05 if tiny else arguments.seconds,
        matrix=256 if tiny else 8192,
        images=24 if tiny else arguments.images,
    )


def measure(plan: Plan) -> dict[str, Any]:
    """Every figure, as plain JSON values."""
    matrix = {precision: _matrix_rate(plan, precision) for precision in plan.precisions}
    copies = _copy_rate(plan)
    limits = {precision: rate["median"] * 1000 / plan.gflop for precision, rate in matrix.items()}
    rows = [row for precision in plan.precisions for row in _forward(plan, precision, limits[precision])]
    best = max(rows, key=lambda row: row["images_per_s"]["median"])
    return {
        "device": torch.cuda.get_device_name(plan.device) if plan.cuda else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "depth": plan.depth,
        "matrix_tflops": matrix,
        "copy_gb_per_s": copies,
        "copy_limit_images_per_s": round(copies["median"] * 1e9 / _CROP_BYTES),
        "limit_images_per_s": {precision: round(limit) for precision, limit in limits.items()},
        "forward": rows,
        "end_to_end": _end_to_end(plan, best),
        "profile": _profile(plan, best),
    }


def _wait(plan: Plan) -> None:
    if plan.cuda:
        torch.cuda.synchronize(plan.device)


def _rate(plan: Plan, work: Callable[[], object], each: float) -> float:
    """`each` per call, over calls for the plan's seconds, per second."""
    work()
    _wait(plan)
    started, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < plan.seconds or not calls:
        for _ in range(5):
            work()
        _wait(plan)
        calls += 5
    return calls * each / spent if calls and spent else 0.0


def _matrix_rate(plan: Plan, precision: str) -> dict[str, float]:
    size = plan.matrix
    left, right = (torch.randn(size, size, device=plan.device).to(DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(left)
    rates = [_rate(plan, lambda: torch.mm(left, right, out=out), 2 * size**3 / 1e12) for _ in range(plan.rounds)]
    return spread(rates, 4)


def _copy_rate(plan: Plan) -> dict[str, float]:
    crops = torch.zeros((plan.batches[-1], _CROP_BYTES), dtype=torch.uint8, pin_memory=plan.cuda)
    there = torch.empty_like(crops, device=plan.device)
    rates = [
        _rate(plan, lambda: there.copy_(crops, non_blocking=True), crops.numel() / 1e9) for _ in range(plan.rounds)
    ]
    return spread(rates)


def _forward(plan: Plan, precision: str, limit: float) -> Iterator[dict[str, Any]]:
    """Rows of one precision: the batch lies on the device already, or comes from the host's memory."""
    weights = random_weights(0, depth=plan.depth)
    crops = seeded_crops(plan.batches[0], 0)
    reference = Engine(weights, device="cpu", fold=False).embed(crops)
    for mode in plan.modes:
        encoder = CropEncoder(weights.config, weights.state, dtype=DTYPES[precision]).to(plan.device)
        lanes = StreamPool(encoder, plan.device, lanes=2, largest_batch=plan.batches[-1])
        started = time.perf_counter()
        if mode == "prepared":
            lanes.prepare()
        prepared_s = time.perf_counter() - started
        error = float(np.abs(lanes.run(crops) - reference).max())
        for batch, rates in _batches(plan, lanes).items():
            rate = rates["device"]
            yield {
                "precision": precision,
                "kernels": lanes.mode,
                "batch": batch,
                "images_per_s": spread(rate, 1),
                "from_host_images_per_s": spread(rates["host"], 1),
                "share_of_limit": round(statistics.median(rate) / limit, 3),
                "largest_error": error,
                "prepared_s": round(prepared_s, 1),
            }


def _batches(plan: Plan, lanes: StreamPool) -> dict[int, dict[str, list[float]]]:
    rates: dict[int, dict[str, list[float]]] = {}
    for batch in plan.batches:
        crops = np.zeros((batch, 224, 224, 3), np.uint8)
        contestants: dict[str, Callable[[], float]] = {
            "device": lambda batch=batch: _rate(plan, lambda: lanes.rehearse(batch), batch),  # type: ignore[misc]  # binds the loop's variable
            "host": lambda crops=crops: _from_host(plan, lanes, crops),  # type: ignore[misc]  # as above
        }
        rates[batch] = alternate(list(contestants), plan.rounds, lambda name, of=contestants: of[name]())  # type: ignore[misc]  # as above
    return rates


def _from_host(plan: Plan, lanes: StreamPool, crops: NDArray[np.uint8]) -> float:
    """Images per second of two callers, whose copies and passes overlap."""
    done = [0, 0]
    lanes.run(crops)
    deadline = time.perf_counter() + plan.seconds

    def call(number: int) -> None:
        while not done[number] or time.perf_counter() < deadline:
            lanes.run(crops)
            done[number] += len(crops)

    started = time.perf_counter()
    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


def _end_to_end(plan: Plan, best: dict[str, Any]) -> dict[str, Any]:
    """JPEG bytes in memory, all cores decoding, one encoder loop."""
    files = list(_jpegs(16 if plan.images > 100 else 4))
    engine = Engine(
        random_weights(0, depth=plan.depth),
        device=plan.device,
        precision=best["precision"],
        compile_kernels="plain" not in best["kernels"],
        largest_batch=best["batch"],
    )
    engine.warm_up()
    limits, cores = LimitSettings(), len(os.sched_getaffinity(0))
    with EncoderLoop(engine, micro_batch=best["batch"]) as loop, ThreadPoolExecutor(cores) as pool:

        def judge(number: int) -> Future[NDArray[np.float32]]:
            return loop.submit(decode(files[number % len(files)], limits)[0])

        started = time.perf_counter()
        for future in list(pool.map(judge, range(plan.images))):
            future.result()
        spent = time.perf_counter() - started
        stats, streams = loop.stats(), loop.streams
    rate = plan.images / spent
    return {
        "images": plan.images,
        "form": "640x480 JPEG",
        "decoding_threads": cores,
        "images_per_s": round(rate, 1),
        "streams_busy_share": round(stats.busy_s / (spent * streams), 3),
        # The device computes for as long as the same images would take it in batches that lie there already.
        "device_busy_share": round(rate / best["images_per_s"]["median"], 3),
        "crops_per_pass": round(stats.crops / stats.batches, 1),
    }


def _jpegs(count: int) -> Iterator[bytes]:
    """Photograph-like pictures: crops with the spectrum of photographs, tiled."""
    crops = seeded_crops(6 * count, 1)
    for number in range(count):
        tiles = crops[6 * number : 6 * number + 6]
        rows = [np.concatenate(tiles[start : start + 3], axis=1) for start in (0, 3)]
        pixels = np.concatenate([*rows, rows[0]], axis=0)[:480, :640]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
        yield buffer.getvalue()


def _profile(plan: Plan, best: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the time of unprepared kernels goes, the longest first."""
    weights = random_weights(0, depth=plan.depth)
    encoder = CropEncoder(weights.config, weights.state, dtype=DTYPES[best["precision"]]).to(plan.device)
    crops = torch.zeros((best["batch"], 224, 224, 3), dtype=torch.uint8, device=plan.device)
    kinds = [torch.profiler.ProfilerActivity.CUDA if plan.cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode():
        encoder(crops)
        with torch.profiler.profile(activities=kinds) as profiler:
            encoder(crops)
            _wait(plan)
    field = "self_device_time_total" if plan.cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events) or 1
    return [
        {"kernel": event.key[:80], "calls": event.count, "share": round(getattr(event, field) / total, 3)}
        for event in events[:12]
    ]


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table for `docs/performance.md`."""
    end = found["end_to_end"]
    lines = [
        f"{found['device']}, {found['cores']} cores, torch {found['torch']}, {found['date']}",
        "",
        "| precision | kernels | batch | images/s | from host memory | of the limit | largest error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(row) for row in found["forward"]),
        "",
        "| limit | measured | images/s |",
        "| --- | --- | --- |",
        *(
            f"| matrix rate, {precision} | {_text(rate)} TFLOP/s | {found['limit_images_per_s'][precision]} |"
            for precision, rate in found["matrix_tflops"].items()
        ),
        f"| copies to the device | {_text(found['copy_gb_per_s'])} GB/s | {found['copy_limit_images_per_s']} |",
        "",
        (
            f"End to end from memory, {end['images']} × {end['form']}, {end['decoding_threads']} decoding threads: "
            f"{end['images_per_s']} images/s, device busy {end['device_busy_share']:.1%}, "
            f"{end['crops_per_pass']} crops a pass."
        ),
    ]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    cells: Sequence[object] = (
        row["precision"],
        row["kernels"],
        row["batch"],
        _text(row["images_per_s"]),
        _text(row["from_host_images_per_s"]),
        f"{row['share_of_limit']:.1%}",
        f"{row['largest_error']:.1g}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _text(figures: dict[str, float]) -> str:
    return f"{figures['median']} ({figures['least']}–{figures['most']})"


if __name__ == "__main__":
    sys.exit(main())
