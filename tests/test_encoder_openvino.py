"""The encoder through OpenVINO: torch's numbers, from any number of threads, and chosen only where they are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from code_worker.encoder import engines
from code_worker.encoder.architecture import VitConfig, expected_shapes
from code_worker.encoder.engines import open_engine
from code_worker.encoder.openvino_engine import OpenVinoEngine
from code_worker.encoder.torch_engine import Engine
from code_worker.encoder.weights import EncoderWeights, random_weights
from code_worker.errors import ConfigurationError
from code_worker.types import EMBEDDING_TOLERANCE

LETTING_GO = """
import gc, os, signal, sys, threading
from code_worker.encoder.openvino_engine import OpenVinoEngine
from code_worker.encoder.weights import random_weights

heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append("heard"))
engines = [OpenVinoEngine(random_weights(7, depth=1))]

def let_go():
    engines.clear()
    gc.collect()

thread = threading.Thread(target=let_go)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGUSR1)
print(*heard)
"""
SMALL = VitConfig(image_size=48, patch_size=8, width=48, depth=3, heads=3, mlp_width=96)


@pytest.fixture(scope="module")
def weights() -> EncoderWeights:
    return random_weights(7, depth=4)


@pytest.fixture(scope="module")
def engine(weights: EncoderWeights) -> OpenVinoEngine:
    return OpenVinoEngine(weights)


def crops(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)


def small_weights(config: VitConfig) -> EncoderWeights:
    torch.manual_seed(5)
    return EncoderWeights(
        config, {name: 0.2 * torch.randn(shape) for name, shape in expected_shapes(config).items()}, "small"
    )


@pytest.mark.numeric
@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_openvino_gives_the_numbers_of_torch(engine: OpenVinoEngine, weights: EncoderWeights, count: int) -> None:
    batch = crops(count)
    found = engine.embed(batch)
    assert found.shape == (count, 192)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, Engine(weights, device="cpu").embed(batch), atol=EMBEDDING_TOLERANCE, rtol=0)


@pytest.mark.numeric
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_small_encoder_sees_the_centre_and_fills_up_with_zeros(qkv_bias: bool) -> None:
    weights = small_weights(replace(SMALL, qkv_bias=qkv_bias))
    found, batch = OpenVinoEngine(weights, streams=1), crops(5)
    expected = Engine(weights, device="cpu").embed(batch)
    np.testing.assert_allclose(found.embed(batch), expected, atol=EMBEDDING_TOLERANCE, rtol=0)
    assert not found.embed(batch)[:, SMALL.width :].any()


@pytest.mark.numeric
def test_threads_get_the_rows_of_their_own_crops(engine: OpenVinoEngine) -> None:
    batches = [crops(6, seed) for seed in range(8)]
    alone = [engine.embed(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(engine.embed, batches))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.numeric
def test_a_row_has_the_same_bits_whatever_else_is_in_its_batch(engine: OpenVinoEngine) -> None:
    batch = crops(5)
    np.testing.assert_array_equal(engine.embed(batch)[3:], engine.embed(batch[3:]))


def test_a_batch_that_is_not_of_crops_is_refused(engine: OpenVinoEngine) -> None:
    with pytest.raises(ValueError, match=r"must be \(n, 224, 224, 3\) uint8"):
        engine.embed(np.zeros((1, 225, 224, 3), np.uint8))


@pytest.mark.numeric
def test_a_cpu_gets_openvino_by_itself_and_torch_where_it_is_named(weights: EncoderWeights) -> None:
    assert open_engine(weights, device="cpu").name == "openvino"
    assert open_engine(weights, device="cpu", engine="torch").name == "torch"
    assert open_engine(weights, device="cpu", engine="openvino").kernels.startswith("OpenVINO 20")


def test_an_engine_that_differs_from_torch_is_not_chosen(
    weights: EncoderWeights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "EMBEDDING_TOLERANCE", 0.0)
    assert open_engine(weights, device="cpu").name == "torch"
    assert "engine_refused" in caplog.text
    with pytest.raises(ConfigurationError, match=r"differ from torch's by .*; use engine torch"):
        open_engine(weights, device="cpu", engine="openvino")


def test_engines_that_do_not_exist_or_do_not_fit_are_refused(
    weights: EncoderWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="unknown; choose one of auto, torch, openvino"):
        open_engine(weights, engine="onnx")
    with pytest.raises(ConfigurationError, match="for device cpu in fp32"):
        open_engine(weights, device="cpu", precision="bf16", engine="openvino")
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'code-worker\[openvino\]'"):
        open_engine(weights, device="cpu", engine="openvino")
    assert open_engine(weights, device="cpu").name == "torch"


def test_openvino_is_imported_by_those_alone_who_run_it(tmp_path: Path) -> None:
    assert importlib.util.find_spec("openvino") is not None
    script = (
        "import sys; from code_worker.encoder.engines import open_engine; "
        "from code_worker.encoder.weights import random_weights; "
        "open_engine(random_weights(0), device='cpu', engine='torch'); sys.exit('openvino' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == 0


def test_a_signal_still_finds_its_stack_when_another_thread_has_let_an_engine_go() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LETTING_GO], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_openvino_reports_nothing_and_writes_nothing_into_a_home(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "asked = ('socket.getaddrinfo', 'socket.connect')\n"
        "sys.addaudithook(lambda event, args: print(event, args, flush=True) if event in asked else None)\n"
        "from code_worker.encoder.openvino_engine import OpenVinoEngine\n"
        "from code_worker.encoder.weights import random_weights\n"
        "OpenVinoEngine(random_weights(5, depth=1)).warm_up()\n"
        "print(sorted(name for name in sys.modules if name.startswith('openvino_')))\n"
    )
    # Where CI is set OpenVINO sends nothing, however it is imported.
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []
