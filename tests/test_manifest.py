from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from code_worker.errors import ArtifactError, IntegrityError
from code_worker.plugins import HEAD_NAME
from code_worker.releases.manifest import MANIFEST_NAME, read_manifest, release_id, verify_files
from tests.release_parts import FILES, plain_manifest, write_plain_release

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    write_plain_release(tmp_path / "release")
    return tmp_path / "release"


def rewrite(release: Path, change: Change) -> None:
    plain = json.loads((release / MANIFEST_NAME).read_bytes())
    change(plain)
    (release / MANIFEST_NAME).write_text(json.dumps(plain))


def test_an_untouched_release_verifies_and_its_id_is_its_manifests_hash(release: Path) -> None:
    manifest, sha256 = verify_files(release)
    assert manifest == plain_manifest(release)
    assert sha256 == hashlib.sha256((release / MANIFEST_NAME).read_bytes()).hexdigest()
    assert release_id(sha256) == f"r-{sha256[:12]}"


def test_manifest_bytes_are_canonical_and_survive_a_round_trip(release: Path) -> None:
    manifest, _ = read_manifest(release)
    assert manifest.to_bytes() == (release / MANIFEST_NAME).read_bytes()
    shuffled = json.dumps(dict(reversed(json.loads(manifest.to_bytes()).items())))
    (release / MANIFEST_NAME).write_text(shuffled)
    assert read_manifest(release)[0].to_bytes() == manifest.to_bytes()


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_and_the_file_named(release: Path, name: str) -> None:
    content = bytearray((release / name).read_bytes())
    content[-1] ^= 1
    (release / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"changed: {name}"):
        verify_files(release)


def test_missing_extra_and_longer_files_are_all_named_at_once(release: Path) -> None:
    (release / "encoder/config.json").unlink()
    (release / "heads/stray.bin").write_bytes(b"x")
    with (release / "encoder/model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(IntegrityError) as caught:
        verify_files(release)
    assert "missing: encoder/config.json" in str(caught.value)
    assert "not listed: heads/stray.bin" in str(caught.value)
    assert "changed: encoder/model.safetensors" in str(caught.value)


def test_a_link_in_a_release_is_refused_even_when_its_content_fits(release: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    (release / "encoder/config.json").rename(outside)
    (release / "encoder/config.json").symlink_to(outside)
    with pytest.raises(IntegrityError, match=r"encoder/config\.json is neither a file nor a directory"):
        verify_files(release)


def test_a_linked_manifest_is_no_manifest(release: Path, tmp_path: Path) -> None:
    (release / MANIFEST_NAME).rename(tmp_path / "elsewhere.json")
    (release / MANIFEST_NAME).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ArtifactError, match="no release"):
        verify_files(release)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "encoder/../../outside",
        "a//b",
        "./a",
        "a\\..\\b",
        "",
        "manifest.json",
        ".hidden",
        "a/",
    ],
)
def test_file_names_that_could_leave_the_directory_are_refused(release: Path, name: str) -> None:
    def add(plain: dict[str, Any]) -> None:
        plain["files"][name] = plain["files"]["encoder/config.json"]

    rewrite(release, add)
    with pytest.raises(ArtifactError, match="not a plain relative path"):
        verify_files(release)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_an_unknown_format_version_is_said_before_anything_else(release: Path, version: object) -> None:
    rewrite(release, lambda plain: plain.update(format=version, something_new=True))
    with pytest.raises(ArtifactError, match="this code_worker reads format 1"):
        read_manifest(release)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plain: plain.update(surprise=1), "surprise"),
        (lambda plain: plain.pop("encoder"), "encoder"),
        (lambda plain: plain["files"]["encoder/config.json"].update(sha256="abc"), "sha256"),
        (
            lambda plain: plain["files"].pop("heads/linear/weights.npz"),
            "not in the file list: heads/linear/weights.npz",
        ),
        (lambda plain: plain["encoder"].update(sha256="0" * 64), "encoder's sha256 is not that of its files"),
        (lambda plain: plain["heads"]["linear"].update(options={"k": 2}), "head 'linear': sha256 is not that"),
        (lambda plain: plain.update(default_head="knn"), "'knn' is not among the heads"),
        (lambda plain: plain.update(thresholds={"low": 0.9, "high": 0.1}), "low 0.9 is above high 0.1"),
        (lambda plain: plain.update(created_at="2026-01-02T03:04:05"), "created_at"),
    ],
)
def test_a_manifest_that_does_not_fit_together_says_what_is_wrong(release: Path, change: Change, said: str) -> None:
    rewrite(release, change)
    with pytest.raises(ArtifactError, match=said):
        read_manifest(release)


def rename_head(release: Path, name: str) -> None:
    def change(plain: dict[str, Any]) -> None:
        plain["heads"] = {name: {**plain["heads"].pop("linear"), "plugin_head": name}}

    rewrite(release, change)


@pytest.mark.parametrize("name", ["a" * 64, "3d", "real-"])
def test_a_head_that_a_plugin_may_offer_fits_into_a_manifest(release: Path, name: str) -> None:
    assert HEAD_NAME.fullmatch(name)
    rename_head(release, name)
    manifest, _ = read_manifest(release)
    assert manifest.heads[name].plugin_head == name


@pytest.mark.parametrize("name", ["", "a" * 65, "Knn", "-a", "a/b", "a\n"])
def test_a_head_that_no_plugin_may_offer_is_refused_in_a_manifest(release: Path, name: str) -> None:
    assert HEAD_NAME.fullmatch(name) is None
    rename_head(release, name)
    with pytest.raises(ArtifactError, match="heads"):
        read_manifest(release)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_bytes_that_are_no_manifest_are_an_artifact_error(release: Path, content: bytes) -> None:
    (release / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ArtifactError):
        read_manifest(release)


def test_a_directory_without_a_manifest_is_no_release(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"it has no manifest\.json"):
        verify_files(tmp_path)


def test_preprocessing_is_part_of_the_encoders_hash(release: Path) -> None:
    rewrite(release, lambda plain: plain["preprocessing"].update(mean=[0.5, 0.5, 0.5]))
    with pytest.raises(ArtifactError, match="encoder's sha256"):
        read_manifest(release)
