from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from code_worker.encoder.torch_engine import Engine
from code_worker.encoder.weights import random_weights
from code_worker.errors import ArtifactError, IntegrityError, PluginError
from code_worker.heads import MAX_TOLERANCE
from code_worker.plugins import Plugins, load_plugins
from code_worker.releases.building import KeptHeads, ReleaseFacts, build_from_parts
from code_worker.releases.integrity import describe_files
from code_worker.releases.loading import load_release
from code_worker.releases.manifest import (
    MANIFEST_NAME,
    Manifest,
    Source,
    encoder_digest,
    head_digest,
    read_manifest,
    release_id,
    write_manifest,
)
from code_worker.releases.reference_scores import PROBES_NAME, golden_embeddings, seeded_crops
from code_worker.settings import Settings
from tests.toy_release import toy_crops

PLUGIN = """
from pathlib import Path
import numpy as np
from code_worker import Head, HeadSpec, hookimpl

class MeanHead(Head):
    loses = {loses}
    def fit(self, embeddings, labels):
        self.centre = float(embeddings.mean())
        return self
    def score(self, embeddings):
        {score}
    def save(self, directory):
        {save}
    @classmethod
    def load(cls, directory, options=None):
        head = cls(options)
        head.centre = float((directory / "mean.txt").read_text())
        return head

@hookimpl
def code_worker_register_heads():
    return [HeadSpec("mean", MeanHead, "a test")]
"""
SCORE = "return (embeddings.mean(1) > self.centre).astype(np.float32)"
SAVE = "(directory / 'mean.txt').write_text(repr(self.centre))"


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins(Settings())


@pytest.fixture
def release(toy_release_dir: Path, tmp_path: Path) -> Path:
    """A copy of the toy release that a test may spoil."""
    return Path(shutil.copytree(toy_release_dir, tmp_path / "release"))


def sign_again(release: Path) -> None:
    """Writes a manifest that fits the spoilt files: what is left to check is the content."""
    manifest, _ = read_manifest(release)
    files = describe_files(release, leave_out={MANIFEST_NAME})
    heads = {
        name: head.model_copy(update={"sha256": head_digest(head.files, files, head.options)})
        for name, head in manifest.heads.items()
    }
    encoder = manifest.encoder.model_copy(
        update={"sha256": encoder_digest(manifest.encoder.files, files, manifest.preprocessing)}
    )
    plain = {**manifest.model_dump(), "files": files, "heads": heads, "encoder": encoder}
    write_manifest(release, Manifest.model_validate(plain))


def with_plugin(directory: Path, *, score: str = SCORE, save: str = SAVE) -> Plugins:
    directory.mkdir()
    (directory / "mean_head.py").write_text(PLUGIN.format(loses=False, score=score, save=save))
    return load_plugins(Settings(plugins_dir=directory))


def build_with(plugins: Plugins, directory: Path) -> Path:
    embeddings = golden_embeddings(16)
    head = plugins.head_class("mean")().fit(embeddings, np.zeros(16, np.int8))
    weights = random_weights(0, depth=1)
    build_from_parts(directory, weights, {"mean": head}, plugins, ReleaseFacts(source=Source(uri="test")))
    return directory


def test_a_loaded_release_names_every_hash_that_a_verdict_needs(toy_release_dir: Path, plugins: Plugins) -> None:
    loaded = load_release(toy_release_dir, plugins)
    manifest, sha256 = read_manifest(toy_release_dir)
    assert (loaded.id, loaded.manifest_sha256) == (release_id(sha256), sha256)
    assert loaded.encoder_sha256 == manifest.encoder.sha256
    assert dict(loaded.head_sha256) == {name: head.sha256 for name, head in manifest.heads.items()}
    assert len({*loaded.head_sha256.values(), loaded.encoder_sha256, sha256}) == 5
    assert manifest.toy
    assert "never trained" in manifest.notes


def test_the_toy_heads_tell_their_two_kinds_of_noise_apart(toy_release_dir: Path, plugins: Plugins) -> None:
    loaded = load_release(toy_release_dir, plugins)
    crops, labels = toy_crops(8, seed=99)
    embeddings = Engine(loaded.weights, device="cpu").embed(crops)
    for name in ("linear", "knn"):
        np.testing.assert_array_equal(loaded.heads[name].score(embeddings) >= 0.5, labels == 1)


@pytest.mark.parametrize("name", ["encoder/model.safetensors", "encoder/config.json", "heads/knn/head.safetensors"])
def test_a_flipped_bit_anywhere_is_found_before_anything_is_parsed(
    release: Path, plugins: Plugins, name: str
) -> None:
    content = bytearray((release / name).read_bytes())
    content[len(content) // 2] ^= 1
    (release / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"changed: {name}"):
        load_release(release, plugins)


def _narrow_encoder(release: Path) -> None:
    path = release / "encoder/model.safetensors"
    arrays = load_file(path)
    save_file({**arrays, "norm.weight": arrays["norm.weight"][:100].copy()}, path)


def _other_config(release: Path) -> None:
    path = release / "encoder/config.json"
    path.write_text(path.read_text().replace('"depth": 2', '"depth": 1'))


def _narrow_head(release: Path) -> None:
    path = release / "heads/linear/head.safetensors"
    arrays = load_file(path)
    save_file({**arrays, "coef": arrays["coef"][:100].copy()}, path)


def _swapped_heads(release: Path) -> None:
    for name in ("head.json", "head.safetensors"):
        shutil.copy(release / "heads/svm" / name, release / "heads/knn" / name)


def _not_finite(release: Path) -> None:
    path = release / "heads/linear/head.safetensors"
    arrays = load_file(path)
    save_file({**arrays, "coef": np.full_like(arrays["coef"], np.nan)}, path)


def _garbage(release: Path) -> None:
    (release / "encoder/model.safetensors").write_bytes(b"\xff" * 64)


@pytest.mark.parametrize(
    "spoil", [_narrow_encoder, _other_config, _narrow_head, _swapped_heads, _not_finite, _garbage]
)
def test_files_that_fit_the_manifest_but_not_each_other_are_refused(
    release: Path, plugins: Plugins, spoil: Callable[[Path], None]
) -> None:
    spoil(release)
    sign_again(release)
    with pytest.raises(ArtifactError):
        load_release(release, plugins)


def test_a_head_whose_plugin_is_gone_names_its_distribution(tmp_path: Path, plugins: Plugins) -> None:
    release = build_with(with_plugin(tmp_path / "plugins"), tmp_path / "release")
    with pytest.raises(PluginError, match=r"'mean' needs the plugin head 'mean' .* of mean_head") as caught:
        load_release(release, plugins)
    assert "not installed" in str(caught.value)


def test_a_plugins_head_is_saved_and_loaded_like_a_built_in_one(tmp_path: Path) -> None:
    plugins = with_plugin(tmp_path / "plugins")
    loaded = load_release(build_with(plugins, tmp_path / "release"), plugins)
    assert loaded.heads["mean"].score(golden_embeddings(8)).shape == (8,)


@pytest.mark.parametrize(
    ("score", "save", "said"),
    [
        (SCORE, "(directory / 'mean.txt').write_text('0.75')", "scores differently once saved and loaded"),
        (SCORE, "pass", "saved no file"),
        (SCORE, "raise KeyError('oops')", r"cannot be saved: KeyError: 'oops'"),
        (SCORE, "raise SystemExit(3)", r"head 'mean' cannot be saved: SystemExit: 3"),
        ("raise SystemExit(3)", SAVE, r"head 'mean' cannot score: SystemExit: 3"),
        (SCORE, "(directory / '.hidden').write_text('1')", "not a plain relative path"),
        (SCORE, "(directory / 'mean.txt').symlink_to('/etc/hostname')", "links are not followed"),
        ("return embeddings.mean(1) * 5", SAVE, r"outside \[0, 1\]"),
        ("return embeddings.mean(1) * float('nan')", SAVE, r"outside \[0, 1\]"),
        ("return embeddings", SAVE, r"shape \(80, 192\)"),
        ("return self.nothing", SAVE, "cannot score: AttributeError"),
    ],
)
def test_a_head_that_breaks_its_contract_makes_no_release(tmp_path: Path, score: str, save: str, said: str) -> None:
    plugins = with_plugin(tmp_path / "plugins", score=score, save=save)
    with pytest.raises(ArtifactError, match=said):
        build_with(plugins, tmp_path / "release")
    assert not (tmp_path / "release" / MANIFEST_NAME).exists()


def test_a_plugin_that_fails_while_loading_is_an_artifact_error(tmp_path: Path) -> None:
    plugins = with_plugin(tmp_path / "plugins")
    release = build_with(plugins, tmp_path / "release")
    (release / "heads/mean/mean.txt").write_text("no number")
    sign_again(release)
    with pytest.raises(ArtifactError, match=r"cannot be loaded by .*MeanHead.*ValueError"):
        load_release(release, plugins)


def test_a_plugin_that_calls_exit_while_loading_is_an_artifact_error(tmp_path: Path) -> None:
    release = build_with(with_plugin(tmp_path / "plugins"), tmp_path / "release")
    quitting = PLUGIN.format(loses=False, score=SCORE, save=SAVE).replace("head = cls", "raise SystemExit(3); cls")
    (tmp_path / "quitting").mkdir()
    (tmp_path / "quitting" / "mean_head.py").write_text(quitting)
    with pytest.raises(ArtifactError, match=r"head 'mean' cannot be loaded by .*SystemExit: 3"):
        load_release(release, load_plugins(Settings(plugins_dir=tmp_path / "quitting")))


OTHER_SCORE = "return (0.5 + (embeddings.mean(1) - self.centre) / 100).clip(0, 1).astype(np.float32)"
SHIFTED_SCORE = OTHER_SCORE.replace("self.centre)", "self.centre + 1e-3)")


def with_changed_code(tmp_path: Path, *, tolerance: float = 0.0) -> tuple[Path, Plugins]:
    """A release, and its plugin as it is after somebody edited its code and not its version."""
    release = build_with(with_plugin(tmp_path / "plugins", score=OTHER_SCORE), tmp_path / "release")
    changed = with_plugin(tmp_path / "changed", score=SHIFTED_SCORE)
    changed.head_class("mean").tolerance = tolerance
    return release, changed


def test_a_head_whose_code_changed_is_refused_under_an_unchanged_release(tmp_path: Path) -> None:
    release, changed = with_changed_code(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"head 'mean' of r-\w{12} does not score as it did .* by up to 1e-05"
    ) as caught:
        load_release(release, changed)
    assert "made by mean_head sha256:" in str(caught.value)
    assert "CODE_WORKER_CHANGED_HEADS=warn" in str(caught.value)


def test_a_head_whose_code_changed_is_used_with_a_warning_if_the_settings_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release, changed = with_changed_code(tmp_path)
    loaded = load_release(release, changed, if_changed="warn")
    (line,) = [record.msg for record in caplog.records if record.msg["event"] == "head_changed"]
    assert line["difference"] == pytest.approx(1e-5, rel=0.01)
    made_by, loaded_by = line["made_by"], line["loaded_by"]
    assert made_by != loaded_by == loaded.head_plugins["mean"] == changed.provider("mean").release
    assert made_by.startswith("mean_head sha256:")


def test_a_difference_within_the_heads_own_tolerance_is_no_change(tmp_path: Path) -> None:
    release, changed = with_changed_code(tmp_path, tolerance=1e-4)
    assert "mean" in load_release(release, changed).heads


def on_another_processor(tmp_path: Path, by: float, plugins: Plugins | None = None) -> tuple[Path, Plugins]:
    """A release with the scores of the probes that a processor of another kind would have given it."""
    plugins = plugins or with_plugin(tmp_path / "plugins", score=OTHER_SCORE)
    release = build_with(plugins, tmp_path / "release")
    arrays = load_file(release / PROBES_NAME)
    save_file({**arrays, "scores/mean": arrays["scores/mean"] + by}, release / PROBES_NAME)
    sign_again(release)
    return release, plugins


def test_rounding_by_the_version_that_made_the_head_is_warned_of_and_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release, plugins = on_another_processor(tmp_path, 1.8e-7)
    assert "mean" in load_release(release, plugins).heads
    (line,) = [record.msg for record in caplog.records if record.msg["event"] == "head_changed"]
    assert line["difference"] == pytest.approx(1.8e-7)
    assert line["made_by"] == line["loaded_by"]
    assert "declare a tolerance" in line["hint"]


def test_more_than_rounding_is_refused_though_it_is_the_same_version(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"by up to 1\.1e-06"):
        load_release(*on_another_processor(tmp_path, 1.1e-6))


def test_rounding_by_another_version_is_refused(tmp_path: Path) -> None:
    release, _ = on_another_processor(tmp_path, 1.8e-7)
    other = with_plugin(tmp_path / "other", score=f"{OTHER_SCORE}  # edited")
    with pytest.raises(ArtifactError, match="does not score as it did"):
        load_release(release, other)


@pytest.mark.parametrize("border", [0.5, 0.2, 0.9])
def test_rounding_that_turns_a_verdict_is_refused(tmp_path: Path, border: float) -> None:
    plugins = with_plugin(tmp_path / "plugins", score=f"return np.full(len(embeddings), {border}, np.float64)")
    release, _ = on_another_processor(tmp_path, -1.8e-7, plugins)
    manifest, _ = read_manifest(release)
    plain = {**manifest.model_dump(), "thresholds": {"low": 0.2, "high": 0.9}}
    write_manifest(release, Manifest.model_validate(plain))
    with pytest.raises(ArtifactError, match="does not score as it did"):
        load_release(release, plugins)


@pytest.mark.parametrize("declared", [MAX_TOLERANCE * 1.001, 1.0, -1e-9, float("nan"), "much"])
def test_a_head_that_declares_more_tolerance_than_rounding_needs_is_refused(tmp_path: Path, declared: float) -> None:
    release, changed = with_changed_code(tmp_path, tolerance=declared)
    with pytest.raises(ArtifactError, match=f"head 'mean' declares a tolerance of {declared!r}; .* from 0 to 0.0001"):
        load_release(release, changed)


def test_a_tolerance_may_be_one_of_numpys_numbers(tmp_path: Path) -> None:
    release, changed = with_changed_code(tmp_path, tolerance=cast("float", np.float32(2e-5)))
    assert "mean" in load_release(release, changed).heads


def test_a_head_that_is_kept_is_compared_with_what_it_was_when_it_was_fitted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release, changed = with_changed_code(tmp_path)
    loaded = load_release(release, changed, if_changed="warn")
    head = changed.head_class("linear")().fit(golden_embeddings(16), np.arange(16, dtype=np.int8) % 2)
    made, kept = tmp_path / "made", KeptHeads.of(loaded, release, {"linear"})
    facts = ReleaseFacts(source=Source(uri="test"))
    build_from_parts(made, loaded.weights, {"linear": head}, changed, facts, kept=kept)
    with pytest.raises(ArtifactError, match=r"head 'mean' of .* by up to 1e-05 .*made by mean_head sha256:"):
        load_release(made, changed)
    caplog.clear()
    assert set(load_release(made, changed, if_changed="warn").heads) == {"linear", "mean"}
    assert [record.msg["head"] for record in caplog.records if record.msg["event"] == "head_changed"] == ["mean"]
    before, after = load_file(release / PROBES_NAME), load_file(made / PROBES_NAME)
    assert set(after) == {"embeddings", "scores/linear", "scores/mean"}
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


def test_heads_kept_of_a_release_from_before_there_were_probes_are_probed_now(tmp_path: Path) -> None:
    plugins = with_plugin(tmp_path / "plugins")
    release = build_with(plugins, tmp_path / "release")
    (release / PROBES_NAME).unlink()
    sign_again(release)
    loaded = load_release(release, plugins)
    made, kept = tmp_path / "made", KeptHeads.of(loaded, release, ())
    build_from_parts(made, loaded.weights, {}, plugins, ReleaseFacts(source=Source(uri="test")), kept=kept)
    assert "scores/mean" in load_file(made / PROBES_NAME)
    assert "mean" in load_release(made, plugins).heads


def test_a_release_from_before_there_were_probes_goes_on_loading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release, changed = with_changed_code(tmp_path)
    (release / PROBES_NAME).unlink()
    sign_again(release)
    with caplog.at_level("INFO"):
        load_release(release, changed)
    assert [record.msg["event"] for record in caplog.records] == ["release_without_probes"]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"embeddings": np.zeros((3, 192), np.float32)}, "has no scores of head 'mean'"),
        ({"embeddings": np.zeros((3, 5), np.float32)}, "holds no embeddings of 192 numbers"),
        (None, "cannot be read"),
    ],
)
def test_probes_that_do_not_fit_the_release_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray] | None, said: str
) -> None:
    plugins = with_plugin(tmp_path / "plugins")
    release = build_with(plugins, tmp_path / "release")
    if arrays is None:
        (release / PROBES_NAME).write_bytes(b"garbage")
    else:
        save_file(arrays, release / PROBES_NAME)
    sign_again(release)
    with pytest.raises(ArtifactError, match=said):
        load_release(release, plugins)


def test_the_probes_hold_what_the_encoder_makes_of_drawn_crops_too(toy_release_dir: Path, plugins: Plugins) -> None:
    probes = load_file(toy_release_dir / PROBES_NAME)
    drawn = Engine(load_release(toy_release_dir, plugins).weights, device="cpu").embed(seeded_crops(16, 20_241))
    assert set(probes) == {"embeddings", "scores/knn", "scores/linear", "scores/svm"}
    np.testing.assert_allclose(probes["embeddings"][64:], drawn, rtol=0, atol=1e-4)
    assert probes["embeddings"][:64].tobytes() == golden_embeddings(64).tobytes()
