"""The way to a CUDA device, as far as a CPU can go it: shapes, padding, lending, compiling and doing without."""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from code_worker.encoder.forward import CropEncoder
from code_worker.encoder.torch_engine import Engine, StreamPool, batch_shapes
from code_worker.encoder.weights import EncoderWeights, random_weights
from code_worker.types import EMBEDDING_TOLERANCE
from tests.fork_server import ADDRESS_ENV, forking_python


@pytest.fixture(scope="module")
def weights() -> EncoderWeights:
    return random_weights(5, depth=2)


def lanes_of(weights: EncoderWeights, *, lanes: int = 2, largest_batch: int = 16) -> StreamPool:
    return StreamPool(CropEncoder(weights.config, weights.state), "cpu", lanes=lanes, largest_batch=largest_batch)


def crops_of(count: int, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)


def test_shapes_double_until_the_largest_batch_fits() -> None:
    assert batch_shapes(1) == batch_shapes(8) == (8,)
    assert batch_shapes(9) == (8, 16)
    assert batch_shapes(256) == (8, 16, 32, 64, 128, 256)


@pytest.mark.numeric
@pytest.mark.parametrize("count", [1, 8, 9, 16, 37])
def test_padded_and_cut_batches_give_each_crop_its_own_row(weights: EncoderWeights, count: int) -> None:
    crops = crops_of(count)
    lanes = lanes_of(weights)
    lanes.run(crops_of(16, seed=9))  # what the buffers hold beyond the batch must not matter
    found = lanes.run(crops)
    assert found.dtype == np.float32
    assert np.abs(found - Engine(weights, device="cpu").embed(crops)).max() < EMBEDDING_TOLERANCE


def test_the_encoder_sees_only_the_prepared_shapes(weights: EncoderWeights) -> None:
    encoder = CropEncoder(weights.config, weights.state)
    seen: list[int] = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    lanes = StreamPool(encoder, "cpu", lanes=1, largest_batch=16)
    for count in (3, 12, 21):
        lanes.run(crops_of(count))
    assert seen == [8, 16, 16, 8]


def test_answers_are_not_overwritten_by_the_next_batch(weights: EncoderWeights) -> None:
    lanes = lanes_of(weights, lanes=1)
    first = lanes.run(crops_of(2, seed=1))
    kept = first.copy()
    lanes.run(crops_of(2, seed=2))
    assert np.array_equal(first, kept)


@pytest.mark.numeric
def test_more_threads_than_lanes_wait_their_turn(weights: EncoderWeights) -> None:
    encoder = CropEncoder(weights.config, weights.state)
    inside, most, lock = [0], [0], threading.Lock()

    def enter(*_: object) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])

    def leave(*_: object) -> None:
        with lock:
            inside[0] -= 1

    encoder.register_forward_pre_hook(enter)
    encoder.register_forward_hook(leave)
    lanes = StreamPool(encoder, "cpu", lanes=2, largest_batch=8)
    batches = [crops_of(3, seed) for seed in range(8)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lanes.run, batches))
    assert 1 <= most[0] <= 2
    expected = Engine(weights, device="cpu").embed(np.concatenate(batches))
    assert np.abs(np.concatenate(found) - expected).max() < EMBEDDING_TOLERANCE


def test_a_lane_out_of_memory_is_lent_again(weights: EncoderWeights) -> None:
    encoder = CropEncoder(weights.config, weights.state)

    def exhaust(_: object, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > 8:
            raise torch.OutOfMemoryError("no room for 16")

    encoder.register_forward_pre_hook(exhaust)
    lanes = StreamPool(encoder, "cpu", lanes=1, largest_batch=16)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            lanes.run(crops_of(16))
    assert lanes.run(crops_of(8)).shape == (8, 192)


@pytest.mark.slow(reason="torch compiles kernels")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_compiled_kernels_give_the_same_embeddings() -> None:
    crops = crops_of(5)
    lanes = lanes_of(random_weights(5, depth=1), largest_batch=8)
    plain = lanes.run(crops)
    lanes.prepare()
    assert lanes.mode == "compiled"  # recording is CUDA's
    assert np.abs(lanes.run(crops) - plain).max() < EMBEDDING_TOLERANCE


@pytest.mark.slow(reason="torch tries to compile kernels")
def test_without_a_compiler_the_kernels_stay_plain_and_a_warning_says_so(tmp_path: Path) -> None:
    code = (
        "import numpy as np\n"
        "from code_worker.encoder.forward import CropEncoder\n"
        "from code_worker.encoder.torch_engine import StreamPool\n"
        "from code_worker.encoder.weights import random_weights\n"
        "weights = random_weights(5, depth=1)\n"
        "lanes = StreamPool(CropEncoder(weights.config, weights.state), 'cpu', lanes=1, largest_batch=8)\n"
        "lanes.prepare()\n"
        "print('mode', lanes.mode, lanes.run(np.zeros((2, 224, 224, 3), np.uint8)).shape)\n"
    )
    environment = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if ADDRESS_ENV in os.environ:
        environment[ADDRESS_ENV] = os.environ[ADDRESS_ENV]
    done = subprocess.run([forking_python(), "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "mode plain (2, 192)" in done.stdout
    assert "encoder_not_compiled" in done.stdout + done.stderr
