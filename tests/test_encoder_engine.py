"""The engine against the published pipeline, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from code_worker.encoder.architecture import VitConfig, expected_shapes
from code_worker.encoder.forward import CropEncoder
from code_worker.encoder.openvino_engine import OpenVinoEngine
from code_worker.encoder.published import load_checkpoint
from code_worker.encoder.torch_engine import Engine, resolve_device
from code_worker.encoder.weights import EncoderWeights, random_weights
from code_worker.errors import ConfigurationError
from code_worker.releases.reference_scores import seeded_crops
from code_worker.training.fitting.network import build_vit
from code_worker.types import EMBEDDING_DIM, EMBEDDING_TOLERANCE
from tests.parity import MEAN, STD, ParitySet


@pytest.fixture(scope="module")
def weights(parity_set: ParitySet) -> EncoderWeights:
    return load_checkpoint(parity_set.directory)


@pytest.fixture(scope="module")
def engine(weights: EncoderWeights) -> Engine:
    return Engine(weights, device="cpu")


def distance(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.numeric
@pytest.mark.parametrize("fold", [True, False])
def test_embeddings_are_those_of_the_published_pipeline(
    parity_set: ParitySet, weights: EncoderWeights, fold: bool
) -> None:
    embeddings = Engine(weights, device="cpu", fold=fold).embed(parity_set.stacked_crops())
    assert embeddings.dtype == np.float32
    assert embeddings.shape == parity_set.embeddings.shape
    assert distance(embeddings, parity_set.embeddings) < EMBEDDING_TOLERANCE


@pytest.mark.numeric
def test_a_crop_alone_and_in_a_batch_is_embedded_alike(parity_set: ParitySet, engine: Engine) -> None:
    crops = parity_set.stacked_crops()[:12]
    alone = np.concatenate([engine.embed(crops[i : i + 1]) for i in range(len(crops))])
    assert distance(alone, engine.embed(crops)) < EMBEDDING_TOLERANCE


@pytest.mark.parametrize(
    "config",
    [VitConfig(), VitConfig(image_size=48, patch_size=8, width=96, depth=2, heads=3, mlp_width=160, qkv_bias=False)],
)
def test_weights_have_the_names_shapes_and_order_of_timms(config: VitConfig) -> None:
    model = build_vit(config)
    assert list(expected_shapes(config).items()) == [(name, tuple(t.shape)) for name, t in model.state_dict().items()]


@pytest.fixture(scope="module")
def in_float64() -> NDArray[np.float64]:
    """What timm's own model gives, `(8, 192)`."""
    weights = random_weights(2)
    model = build_vit(weights.config)
    model.load_state_dict(weights.state)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    pixels = (torch.from_numpy(seeded_crops(8, seed=2)).double() / 255 - mean) / std
    with torch.inference_mode():
        embeddings: NDArray[np.float64] = model.double()(pixels.permute(0, 3, 1, 2)).numpy()
    return embeddings


ENGINES: dict[str, Callable[[EncoderWeights], Engine | OpenVinoEngine]] = {
    "torch": lambda weights: Engine(weights, device="cpu"),
    "torch unfolded": lambda weights: Engine(weights, device="cpu", fold=False),
    "openvino": OpenVinoEngine,
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_keeps_the_promise_beside_the_plain_model_in_float64(
    name: str, in_float64: NDArray[np.float64]
) -> None:
    embeddings = ENGINES[name](random_weights(2)).embed(seeded_crops(8, seed=2))
    assert distance(embeddings, in_float64) < EMBEDDING_TOLERANCE


def test_random_weights_tell_images_apart(parity_set: ParitySet) -> None:
    embeddings = Engine(random_weights(0), device="cpu").embed(parity_set.stacked_crops()[:8])
    assert embeddings.std(axis=0).min() > 0.05


def test_crops_that_must_not_be_written_to_are_taken(engine: Engine) -> None:
    crop = np.asarray(Image.new("RGB", (224, 224), "red"))[None]
    crop.flags.writeable = False
    strided = np.repeat(crop, 2, axis=0)[::2]
    assert np.array_equal(engine.embed(crop), engine.embed(strided))


def test_no_crops_give_no_embeddings(engine: Engine) -> None:
    assert engine.embed(np.empty((0, 224, 224, 3), np.uint8)).shape == (0, 192)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 3, 224, 224), "u1"), ((224, 224, 3), "u1"), ((1, 224, 224, 3), "f4"), ((1, 96, 96, 3), "u1")],
)
def test_other_shapes_and_types_are_refused(engine: Engine, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match=r"\(n, 224, 224, 3\) uint8"):
        engine.embed(np.zeros(shape, dtype))  # type: ignore[arg-type]  # the very thing that is refused


def test_threads_may_share_an_engine(parity_set: ParitySet, engine: Engine) -> None:
    crops = parity_set.stacked_crops()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(engine.embed, [crops[i : i + 5] for i in range(0, len(crops), 5)]))
    assert distance(np.concatenate(results), parity_set.embeddings) < EMBEDDING_TOLERANCE


def test_warming_up_needs_no_image(engine: Engine) -> None:
    engine.warm_up(2)
    assert (engine.device, engine.precision) == ("cpu", "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_cpu_is_refused_with_the_reason(precision: str) -> None:
    with pytest.raises(ConfigurationError, match="for CUDA devices: on a CPU it moves embeddings"):
        Engine(random_weights(1, depth=1), device="cpu", precision=precision)


def test_an_unknown_precision_or_device_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="choose one of fp32, bf16, fp16"):
        Engine(random_weights(1, depth=1), device="cpu", precision="int8")
    for device in ("gpu", "cuda:", "cuda:x", "cpu:0", "mps", ""):
        with pytest.raises(ConfigurationError, match="choose auto, cpu, cuda or cuda:N"):
            resolve_device(device)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"device 'cuda:99' is not there"):
        resolve_device("cuda:99")


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_blocks_err_by_so_much_more_as_they_round_coarser(
    parity_set: ParitySet, dtype: torch.dtype
) -> None:
    bound = EMBEDDING_TOLERANCE * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    weights = load_checkpoint(parity_set.directory)
    encoder = CropEncoder(weights.config, weights.state, dtype=dtype)
    with torch.inference_mode():
        embeddings = encoder(torch.from_numpy(parity_set.stacked_crops()[:6])).numpy()
    assert embeddings.dtype == np.float32
    assert 1e-4 < distance(embeddings, parity_set.embeddings[:6]) < bound


def test_importing_the_encoder_touches_no_cuda_and_sets_no_threads() -> None:
    code = (
        "import torch; before = torch.get_num_threads()\n"
        "import code_worker.encoder.torch_engine, code_worker.encoder.loop, code_worker.encoder.published\n"
        "print(torch.cuda.is_initialized(), torch.get_num_threads() == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.numeric
@pytest.mark.parametrize("fold", [True, False])
def test_a_smaller_encoder_sees_the_centre_and_fills_up_with_zeros(fold: bool) -> None:
    config = VitConfig(image_size=48, patch_size=8, width=96, depth=2, heads=3, mlp_width=160)
    torch.manual_seed(3)
    model = build_vit(config)
    weights = EncoderWeights(config, dict(model.state_dict()), "a test")
    crops = np.random.default_rng(3).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    embeddings = Engine(weights, device="cpu", fold=fold).embed(crops)
    centre = crops[:, 88:136, 88:136]
    pixels = (torch.from_numpy(centre).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.inference_mode():
        expected = model(pixels.permute(0, 3, 1, 2)).numpy()
    assert embeddings.shape == (3, EMBEDDING_DIM)
    assert distance(embeddings[:, :96], expected) < EMBEDDING_TOLERANCE
    assert not embeddings[:, 96:].any()
    crops[:, :88] = 0
    assert np.array_equal(Engine(weights, device="cpu", fold=fold).embed(crops), embeddings)


def test_an_engine_goes_on_with_the_weights_that_it_was_made_of() -> None:
    weights, crops = random_weights(4, depth=1), seeded_crops(1)
    engine = Engine(weights, device="cpu")
    before = engine.embed(crops)
    for tensor in weights.state.values():
        tensor.zero_()
    np.testing.assert_array_equal(engine.embed(crops), before)
