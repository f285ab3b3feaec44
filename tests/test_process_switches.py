"""What an application sets for its whole process changes neither an embedding nor a score."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from code_worker.encoder.engines import open_engine
from code_worker.encoder.forward import exact_arithmetic
from code_worker.encoder.torch_engine import Engine
from code_worker.encoder.weights import random_weights
from code_worker.moderation.judge import score_rows
from code_worker.plugins import load_plugins
from code_worker.releases.loading import load_release
from code_worker.settings import Settings
from code_worker.types import EMBEDDING_TOLERANCE
from tests.corpus.pictures import pictures
from tests.process_switches import switches
from tests.toy_release import toy_crops, write_toy_release

ROOT = Path(__file__).resolve().parent.parent
SCORED = 1e-4
"""Scores of embeddings that are `EMBEDDING_TOLERANCE` apart, as the conformance kit allows of one embedding."""
Numbers = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_release(tmp_path_factory.mktemp("switches") / "release", depth=1)


@pytest.fixture(params=["torch", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def failed(error: BaseException, images: int) -> None:
    raise AssertionError(images) from error


def numbers(release: Path, engine: str) -> Numbers:
    """Embeddings and scores of four crops, everything built anew."""
    loaded = load_release(release, load_plugins(Settings()))
    embeddings = open_engine(loaded.weights, engine=engine, device="cpu").embed(toy_crops(4, seed=3)[0])
    scores = {name: np.array(score_rows(head, name, embeddings, failed)) for name, head in loaded.heads.items()}
    return {"embeddings": embeddings} | scores


@pytest.fixture(scope="module")
def expected(release: Path) -> Mapping[str, Numbers]:
    return {engine: numbers(release, engine) for engine in ("torch", "openvino")}


@pytest.fixture(params=sorted(switches()))
def switched(request: pytest.FixtureRequest) -> Iterator[str]:
    turn_on, turn_off = switches()[request.param]
    turn_on()
    try:
        yield str(request.param)
    finally:
        turn_off()


def test_no_switch_moves_an_embedding_or_a_score(
    expected: Mapping[str, Numbers], release: Path, engine: str, switched: str
) -> None:
    found = numbers(release, engine)
    moved = {name: float(np.abs(found[name] - one).max()) for name, one in expected[engine].items()}
    assert moved.pop("embeddings") <= EMBEDDING_TOLERANCE, switched
    assert max(moved.values()) <= SCORED, switched


def test_a_processor_multiplies_in_float32_while_the_encoder_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    engine = Engine(random_weights(3, depth=1), device="cpu")

    def look(*_: Any) -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))

    engine._encoder.norm.register_forward_pre_hook(look)
    crops = toy_crops(1)[0]
    for precision in ("medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        try:
            with torch.autocast("cpu", enabled=precision == "medium"):
                engine.embed(crops)
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False)] * 2


def test_the_last_that_leaves_puts_the_precision_back() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with exact_arithmetic("cpu"):
            with exact_arithmetic("cpu"):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def scanned(release: Path, directory: Path, program: str) -> list[dict[str, Any]]:
    """What a `scan` of the directory prints, as a program of its own."""
    command = [sys.executable, "-c", program, "scan", str(directory), "--release", str(release), "--json"]
    environment = os.environ | {"CODE_WORKER_ENGINE": "torch"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 1}, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow(reason="starts two scans as programs, each of which imports torch")
def test_a_scan_with_every_switch_set_says_the_same(release: Path, tmp_path: Path) -> None:
    for name in ("ok_jpeg", "ok_png", "ok_gif", "ok_bmp", "ok_tiff", "ok_webp"):
        data = pictures()[name]
        (tmp_path / f"{name}.jpg").write_bytes(data)
        (tmp_path / f"{name}_cut.jpg").write_bytes(data[: len(data) // 2])
    plain = "import sys; sys.argv[0] = 'code-worker'; from code_worker.cli.main import main; main()"
    before = scanned(release, tmp_path, plain)
    after = scanned(release, tmp_path, f"from tests.process_switches import set_all; set_all(); {plain}")
    assert {record["outcome"] for record in before} == {"judged", "rejected"}
    for one, other in zip(before, after, strict=True):
        score, again = one.pop("score"), other.pop("score")
        assert (again is None) == (score is None)
        assert score is None or abs(again - score) <= SCORED
        for name in ("uri", "sha256", "outcome", "label", "reason", "detail", "head", "release"):
            assert other[name] == one[name]
