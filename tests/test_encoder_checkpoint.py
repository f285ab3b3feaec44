"""Import of encoders: the published form, training checkpoints, our own form, and everything that is refused."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from code_worker.encoder.architecture import VitConfig
from code_worker.encoder.published import load_checkpoint
from code_worker.encoder.torch_engine import Engine
from code_worker.encoder.weights import random_weights, read_weights, save_weights
from code_worker.errors import ArtifactError, ConfigurationError, UnsafeArtifactError
from code_worker.training.fitting.network import build_vit
from code_worker.types import EMBEDDING_TOLERANCE
from tests.parity import ParitySet, random_vit, reference_embeddings, save_published


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A one-block checkpoint in the published form, to be changed by the test."""
    directory = tmp_path / "published"
    save_published(random_vit(3, num_hidden_layers=1), directory)
    return directory


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def change_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    state = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_configuration_comes_from_the_published_config(parity_set: ParitySet) -> None:
    config = load_checkpoint(parity_set.directory).config
    assert config == VitConfig(layer_norm_eps=1e-12)


def test_mean_and_std_are_the_methods_not_the_preprocessor_files(parity_set: ParitySet) -> None:
    stated = json.loads((parity_set.directory / "preprocessor_config.json").read_text())
    assert stated["image_mean"] == [0.5, 0.5, 0.5]
    assert load_checkpoint(parity_set.directory).config.mean == (0.485, 0.456, 0.406)


def test_pytorch_model_bin_gives_the_same_weights_as_safetensors(published: Path) -> None:
    expected = load_checkpoint(published).state
    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    assert same_weights(load_checkpoint(published).state, expected)


def test_a_vit_prefix_is_taken_off(published: Path) -> None:
    expected = load_checkpoint(published).state
    path = published / "model.safetensors"
    save_file({f"vit.{name}": tensor for name, tensor in load_file(path).items()}, path)
    assert same_weights(load_checkpoint(published).state, expected)


def test_names_as_newer_transformers_have_them_are_known(published: Path) -> None:
    expected = load_checkpoint(published).state
    model = random_vit(3, num_hidden_layers=1)
    names = model.state_dict()
    assert "layers.0.attention.q_proj.weight" in names, "this is about the names that the model has in memory"
    save_file({name: tensor.contiguous() for name, tensor in names.items()}, published / "model.safetensors")
    assert same_weights(load_checkpoint(published).state, expected)


def test_sharded_weights_are_read_by_their_index(published: Path) -> None:
    expected = load_checkpoint(published).state
    (published / "model.safetensors").unlink()
    random_vit(3, num_hidden_layers=1).save_pretrained(published, max_shard_size="500KB")
    assert len(list(published.glob("model-*.safetensors"))) > 1
    assert same_weights(load_checkpoint(published).state, expected)
    index = published / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    for change, said in (
        ({"layernorm.bias": "../model-00001-of-00001.safetensors"}, "names '../model"),
        ({"no.such": "model-00001-of-00005.safetensors"}, r"no\.such is not in model-00001"),
    ):
        index.write_text(json.dumps({"weight_map": {**where["weight_map"], **change}}))
        with pytest.raises(ArtifactError, match=said):
            load_checkpoint(published)
    index.write_text("[]")
    with pytest.raises(ArtifactError, match=r"index\.json cannot be read"):
        load_checkpoint(published)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_one(published: Path, name: str) -> None:
    (published / "model.safetensors").unlink()
    (published / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 22000000\n"
    )
    with pytest.raises(ArtifactError, match=rf"{name} is a Git LFS pointer, not the file: run `git lfs pull`"):
        load_checkpoint(published)


def test_a_name_with_and_without_the_prefix_is_refused(published: Path) -> None:
    change_weights(published, **{"vit.layernorm.bias": torch.zeros(192)})
    with pytest.raises(ArtifactError, match=r"prefix 'vit\.'"):
        load_checkpoint(published)


def test_the_pooler_may_be_missing(published: Path) -> None:
    change_weights(published, pooler__dense__weight=None, pooler__dense__bias=None)
    assert len(load_checkpoint(published).state) == 18


@pytest.mark.numeric
def test_a_checkpoint_without_qkv_bias_is_represented(tmp_path: Path, parity_set: ParitySet) -> None:
    model = random_vit(5, num_hidden_layers=2, qkv_bias=False)
    save_published(model, tmp_path)
    crops = parity_set.stacked_crops()[:3]
    embeddings = Engine(load_checkpoint(tmp_path), device="cpu").embed(crops)
    assert np.abs(embeddings - reference_embeddings(model, crops)).max() < EMBEDDING_TOLERANCE


def test_half_precision_weights_are_widened_exactly(published: Path) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(published / "model.safetensors").items()}
    save_file(halves, published / "model.safetensors")
    norm = load_checkpoint(published).state["norm.weight"]
    assert norm.dtype == torch.float32
    assert torch.equal(norm, halves["layernorm.weight"].float())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "deit"}, "model_type is 'deit'"),
        ({"hidden_act": "gelu_new"}, "activation 'gelu_new'"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"image_size": 384}, "image_size is 384"),
        ({"image_size": [224, 256]}, "not square"),
        ({"patch_size": 15}, "patch_size 15"),
        ({"patch_size": 14}, "embeddings.position_embeddings is"),
        ({"patch_size": [16, 8]}, "not square"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"hidden_size": 384}, "width is 384"),
        ({"hidden_size": "absent"}, "width is 768"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"num_hidden_layers": 2}, "missing encoder.layer.1"),
        ({"num_hidden_layers": 1.0}, "depth must be a positive whole number"),
        ({"intermediate_size": 512}, "intermediate.dense.weight is"),
        ({"qkv_bias": False}, "unexpected encoder.layer.0.attention.attention.query.bias"),
        ({"qkv_bias": "yes"}, "qkv_bias"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"head_dim": 32}, "head_dim"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
    ],
)
def test_a_config_that_cannot_be_represented_exactly_is_refused(
    published: Path, changes: dict[str, object], said: str
) -> None:
    change_config(published, **changes)
    with pytest.raises(ArtifactError, match=said):
        load_checkpoint(published)


def test_square_sizes_may_be_lists(published: Path) -> None:
    change_config(published, image_size=[224, 224], patch_size=[16, 16])
    assert load_checkpoint(published).config.patch_size == 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layernorm__bias": None}, r"missing layernorm\.bias"),
        ({"classifier__weight": torch.zeros(2, 192)}, r"unexpected classifier\.weight"),
        ({"embeddings__position_embeddings": torch.zeros(1, 577, 192)}, r"is \(1, 577, 192\), not \(1, 197, 192\)"),
        (
            {"encoder__layer__0__attention__attention__key__weight": torch.zeros(192, 96)},
            r"key\.weight is \(192, 96\)",
        ),
        ({"layernorm__bias": torch.full((192,), float("nan"))}, r"norm\.bias holds a value that is not finite"),
        ({"layernorm__bias": torch.full((192,), float("-inf"))}, "not finite"),
        ({"layernorm__bias": torch.zeros(192, dtype=torch.float64)}, "float64"),
        ({"layernorm__bias": torch.zeros(192, dtype=torch.int32)}, "int32"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    published: Path, changes: dict[str, torch.Tensor | None], said: str
) -> None:
    change_weights(published, **changes)
    with pytest.raises(ArtifactError, match=said):
        load_checkpoint(published)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"model_type": "vit", "image_size": null}'])
def test_a_config_that_is_no_config_is_refused(published: Path, text: str) -> None:
    (published / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config"):
        load_checkpoint(published)


def test_what_is_not_there_is_said(published: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such directory"):
        load_checkpoint(published / "nowhere")
    (published / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"none of model\.safetensors, .* and pytorch_model\.bin"):
        load_checkpoint(published)
    (published / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        load_checkpoint(published)


def test_cut_safetensors_are_refused(published: Path) -> None:
    path = published / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        load_checkpoint(published)


class Evil:
    """Asks an unpickler to run a command that would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "bare pickle 2"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.pth.tar"])
def test_a_malicious_pickle_is_refused_by_the_name_it_asks_for(published: Path, form: str, name: str) -> None:
    mark, path = published / "executed", published / name
    content = {"state_dict": {"cls_token": Evil(mark)}}
    if form.startswith("bare"):
        path.write_bytes(pickle.dumps(content, protocol=2 if form.endswith("2") else 5))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    (published / "model.safetensors").unlink()
    with pytest.raises(UnsafeArtifactError, match=r"posix\.system"):
        load_checkpoint(published if name.endswith("bin") else path)
    assert not mark.exists()


def test_damaged_training_checkpoints_are_artifact_errors(tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": {"cls_token": torch.zeros(1, 1, 192)}}, path)
    whole = path.read_bytes()
    rng = random.Random(11)
    damaged = [b"", b"hello world", whole[: len(whole) // 2]]
    for _ in range(40):
        flipped = bytearray(whole)
        for _ in range(3):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            load_checkpoint(path)


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return build_vit(VitConfig()).state_dict()


def test_a_training_checkpoint_keeps_timms_eps(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "last.pth.tar"
    averaged = {name: tensor + 1 for name, tensor in trained.items()}
    torch.save(
        {
            "epoch": 3,
            "metric": np.float64(97.25),
            "best": np.float32(0.5),
            "steps": np.int64(7),
            "arch": "vit_tiny_patch16_224",
            "args": argparse.Namespace(model="vit_tiny_patch16_224", mean=(0.5,), resume="", lr=2e-3),
            "state_dict": {f"module.{name}": tensor for name, tensor in trained.items()},
            "state_dict_ema": averaged,
        },
        path,
    )
    weights = load_checkpoint(path)
    assert weights.config == VitConfig(layer_norm_eps=1e-6)
    assert same_weights(weights.state, trained)
    assert same_weights(load_checkpoint(path, state="state_dict_ema").state, averaged)


def test_a_bare_state_dict_with_a_classifier_is_read(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "encoder.pth"
    torch.save({**trained, "head.weight": torch.zeros(2, 192), "head.bias": torch.zeros(2)}, path)
    assert same_weights(load_checkpoint(path).state, trained)
    with pytest.raises(ArtifactError, match="state_dict_ema"):
        load_checkpoint(path, state="state_dict_ema")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"fc_norm.weight": torch.zeros(192)}, "average pooling"),
        ({"reg_token": torch.zeros(1, 4, 192)}, "unexpected reg_token"),
        ({"module.norm.bias": torch.zeros(192)}, r"prefix 'module\.'"),
        ({"epoch": 3}, "entry 'epoch' is no tensor but int"),
    ],
)
def test_other_training_checkpoints_are_refused_by_name(
    tmp_path: Path, trained: dict[str, torch.Tensor], extra: dict[str, object], said: str
) -> None:
    torch.save({"state_dict": {**trained, **extra}}, tmp_path / "last.pth.tar")
    with pytest.raises(ArtifactError, match=said):
        load_checkpoint(tmp_path / "last.pth.tar")


def test_a_checkpoint_without_the_state_asked_for_lists_what_it_holds(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    torch.save({"state_dict": trained, "epoch": 1}, tmp_path / "last.pth.tar")
    with pytest.raises(ArtifactError, match="it holds epoch, state_dict"):
        load_checkpoint(tmp_path / "last.pth.tar", state="state_dict_ema")


def test_saved_weights_come_back_and_their_bytes_depend_on_nothing_else(tmp_path: Path, published: Path) -> None:
    weights = load_checkpoint(published)
    save_weights(weights, tmp_path / "one")
    back = read_weights(tmp_path / "one")
    assert back.config == weights.config
    assert same_weights(back.state, weights.state)
    elsewhere = shutil.copytree(published, tmp_path / "elsewhere")
    save_weights(load_checkpoint(elsewhere), tmp_path / "two")
    for name in ("encoder/model.safetensors", "encoder/config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"width": 192}'])
def test_a_stored_config_that_is_not_ours_is_refused(tmp_path: Path, text: str) -> None:
    save_weights(random_weights(1, depth=1), tmp_path)
    (tmp_path / "encoder/config.json").write_text(text)
    with pytest.raises(ArtifactError, match="encoder config"):
        read_weights(tmp_path)


def test_stored_weights_that_are_missing_or_of_another_depth_are_refused(tmp_path: Path) -> None:
    save_weights(random_weights(1, depth=2), tmp_path)
    (tmp_path / "encoder/config.json").write_text(VitConfig(depth=1).to_json())
    with pytest.raises(ArtifactError, match=r"unexpected blocks\.1"):
        read_weights(tmp_path)
    (tmp_path / "encoder/model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_weights(tmp_path)


def test_random_weights_are_the_same_bits_on_every_machine() -> None:
    state = random_weights(1, depth=1).state
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
    assert digest[:16] == "5d9d570202fc4aaa"
