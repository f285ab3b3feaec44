from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from code_worker.errors import ArtifactError, ConfigurationError, IntegrityError
from code_worker.releases.artifacts import ArtifactStore, LocalArtifacts, S3Artifacts, open_artifacts
from code_worker.releases.manifest import MANIFEST_NAME, read_manifest, release_id
from code_worker.settings import S3Settings, Settings
from tests.faults.rows import Seen, row
from tests.release_parts import FILES, write_plain_release
from tests.servers import S3Server

Damage = Callable[[str, bytes | None], None]


class Kept:
    """An artifact store, and a way to reach behind it."""

    def __init__(self, store: ArtifactStore, damage: Damage) -> None:
        self.store = store
        self.damage = damage
        """Overwrites (or with None removes) the object at this name below the root."""


def s3_settings(server: S3Server) -> S3Settings:
    return S3Settings(
        endpoint_url=server.url,
        region="us-east-1",
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
        path_style=True,
        max_attempts=1,
        connect_timeout_s=60.0,
        read_timeout_s=60.0,
    )


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    name = f"artifacts-{uuid.uuid4().hex[:8]}"
    s3_server.client().create_bucket(Bucket=name)
    return name


@pytest.fixture(params=["directory", "s3"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Kept:
    if request.param == "directory":
        root = tmp_path / "kept"

        def damage_file(name: str, content: bytes | None) -> None:
            (root / name).unlink() if content is None else (root / name).write_bytes(content)

        return Kept(LocalArtifacts(root), damage_file)
    server: S3Server = request.getfixturevalue("s3_server")
    name: str = request.getfixturevalue("bucket")

    def damage_object(key: str, content: bytes | None) -> None:
        if content is None:
            server.client().delete_object(Bucket=name, Key=f"some/prefix/{key}")
        else:
            server.client().put_object(Bucket=name, Key=f"some/prefix/{key}", Body=content)

    return Kept(S3Artifacts(f"s3://{name}/some/prefix", s3_settings(server), cache=tmp_path / "cache"), damage_object)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    write_plain_release(tmp_path / "release")
    return tmp_path / "release"


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_was_put_is_fetched_byte_for_byte(kept: Kept, release: Path) -> None:
    id_ = release_id(read_manifest(release)[1])
    assert not kept.store.exists(id_)
    location = kept.store.put(release)
    assert location.endswith(id_)
    assert kept.store.exists(id_)
    assert kept.store.list() == [id_]
    assert content_of(kept.store.fetch(id_)) == content_of(release)


def test_putting_the_same_release_twice_changes_nothing(kept: Kept, release: Path) -> None:
    first = kept.store.put(release)
    assert kept.store.put(release) == first
    assert len(kept.store.list()) == 1


def test_two_releases_live_side_by_side(kept: Kept, release: Path, tmp_path: Path) -> None:
    ids = {Path(kept.store.put(release)).name}
    write_plain_release(tmp_path / "other", notes="another")
    ids.add(Path(kept.store.put(tmp_path / "other")).name)
    assert set(kept.store.list()) == ids
    assert len(ids) == 2


def test_a_damaged_directory_is_never_stored(kept: Kept, release: Path) -> None:
    (release / "encoder/config.json").write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"changed: encoder/config\.json"):
        kept.store.put(release)
    assert kept.store.list() == []


@pytest.mark.parametrize("content", [b"flipped", None])
def test_a_kept_file_that_rots_or_vanishes_is_refused_and_put_mends_it(
    kept: Kept, release: Path, content: bytes | None
) -> None:
    id_ = Path(kept.store.put(release)).name
    kept.damage(f"{id_}/encoder/model.safetensors", content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors|404"):
        kept.store.fetch(id_)
    kept.store.put(release)
    assert content_of(kept.store.fetch(id_)) == content_of(release)


def test_a_manifest_swapped_for_a_valid_one_of_another_release_is_refused(
    kept: Kept, release: Path, tmp_path: Path
) -> None:
    id_ = Path(kept.store.put(release)).name
    write_plain_release(tmp_path / "other", notes="not what was promoted")
    kept.damage(f"{id_}/{MANIFEST_NAME}", (tmp_path / "other" / MANIFEST_NAME).read_bytes())
    with pytest.raises(IntegrityError, match=f"not of {id_}"):
        kept.store.fetch(id_)


def test_a_release_without_its_manifest_does_not_exist(kept: Kept, release: Path) -> None:
    id_ = Path(kept.store.put(release)).name
    kept.damage(f"{id_}/{MANIFEST_NAME}", None)
    assert not kept.store.exists(id_)
    assert kept.store.list() == []
    with pytest.raises(ArtifactError):
        kept.store.fetch(id_)


@pytest.mark.parametrize("left", [None, b"", b"cut short"])
def test_a_release_that_lacks_a_file_is_none_though_a_copy_of_it_is_cached(
    kept: Kept, release: Path, left: bytes | None
) -> None:
    id_ = Path(kept.store.put(release)).name
    kept.store.fetch(id_)
    assert kept.store.exists(id_)
    kept.damage(f"{id_}/encoder/model.safetensors", left)
    assert not kept.store.exists(id_)
    kept.store.put(release)
    assert kept.store.exists(id_)
    kept.damage(f"{id_}/{MANIFEST_NAME}", b"{}")
    assert not kept.store.exists(id_)


def test_a_release_that_lacks_a_file_is_not_taken_for_a_storage_that_is_away(kept: Kept, release: Path) -> None:
    id_ = Path(kept.store.put(release)).name
    kept.damage(f"{id_}/encoder/model.safetensors", None)
    with pytest.raises(IntegrityError, match=r"encoder/model\.safetensors"):
        kept.store.fetch(id_)


def test_an_unknown_release_is_named(kept: Kept) -> None:
    with pytest.raises(ArtifactError, match="r-0123456789ab is not in"):
        kept.store.fetch("r-0123456789ab")


def test_a_signature_of_a_release_that_is_not_there_is_refused_and_makes_nothing(kept: Kept) -> None:
    with pytest.raises(ArtifactError, match="r-0123456789ab is not in"):
        kept.store.put_signature("r-0123456789ab", b"signed")
    assert kept.store.signature("r-0123456789ab") is None
    assert not kept.store.drop("r-0123456789ab")


@pytest.mark.parametrize("id_", ["", "..", "../../etc", "r-0123456789AB", "r-0123456789ab/..", "champion"])
def test_only_release_ids_are_looked_up(kept: Kept, id_: str) -> None:
    with pytest.raises(ArtifactError, match="no release id"):
        kept.store.fetch(id_)
    with pytest.raises(ArtifactError, match="no release id"):
        kept.store.exists(id_)


def test_a_cached_copy_that_rots_is_fetched_again(
    bucket: str, s3_server: S3Server, release: Path, tmp_path: Path
) -> None:
    store = S3Artifacts(f"s3://{bucket}", s3_settings(s3_server), cache=tmp_path / "cache")
    id_ = Path(store.put(release)).name
    cached = store.fetch(id_)
    (cached / "encoder/config.json").write_bytes(b"rot")
    assert content_of(store.fetch(id_)) == content_of(release)


def test_a_whole_cached_copy_needs_no_server(bucket: str, s3_server: S3Server, release: Path, tmp_path: Path) -> None:
    store = S3Artifacts(f"s3://{bucket}", s3_settings(s3_server), cache=tmp_path / "cache")
    id_ = Path(store.put(release)).name
    store.fetch(id_)
    nowhere = S3Settings(endpoint_url="http://127.0.0.1:9", region="us-east-1")
    assert content_of(S3Artifacts(f"s3://{bucket}", nowhere, cache=tmp_path / "cache").fetch(id_)) == content_of(
        release
    )


def test_a_server_that_is_away_is_an_artifact_error(release: Path, tmp_path: Path, s3_server: S3Server) -> None:
    settings = s3_settings(s3_server).model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    store = S3Artifacts("s3://nowhere", settings, cache=tmp_path / "cache")
    for act in (lambda: store.put(release), store.list, lambda: store.fetch("r-0123456789ab")):
        with pytest.raises(ArtifactError, match="s3://nowhere"):
            act()


def test_a_missing_bucket_is_an_artifact_error(release: Path, tmp_path: Path, s3_server: S3Server) -> None:
    store = S3Artifacts("s3://never-created", s3_settings(s3_server), cache=tmp_path / "cache")
    with pytest.raises(ArtifactError, match=r"NoSuchBucket|does not exist"):
        store.put(release)


def test_a_root_that_cannot_be_written_is_an_artifact_error(release: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot write release"):
        LocalArtifacts(tmp_path / "file").put(release)


def test_an_upload_cut_short_leaves_no_release_behind(
    bucket: str, s3_server: S3Server, release: Path, tmp_path: Path
) -> None:
    for name in FILES:
        s3_server.client().upload_file(str(release / name), bucket, f"{release_id('0' * 64)}/{name}")
    store = S3Artifacts(f"s3://{bucket}", s3_settings(s3_server), cache=tmp_path / "cache")
    assert store.list() == []
    with pytest.raises(ArtifactError, match="is not in"):
        store.fetch(release_id("0" * 64))


def test_abandoned_copies_are_dropped_after_a_day_and_not_before(release: Path, tmp_path: Path) -> None:
    root = tmp_path / "kept"
    drafts = [root / ".incomplete" / name for name in ("old", "old-signature", "young")]
    drafts[0].mkdir(parents=True)
    drafts[1].touch()
    drafts[2].mkdir()
    for old in drafts[:2]:
        os.utime(old, (1, 1))
    LocalArtifacts(root).put(release)
    assert [path.exists() for path in drafts] == [False, False, True]


PUT = "import sys; from pathlib import Path; from code_worker.releases.artifacts import LocalArtifacts as L; "
PUT += "print(L(Path(sys.argv[1])).put(Path(sys.argv[2])))"


def test_processes_that_store_the_same_release_at_once_agree(release: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUT, str(tmp_path / "kept"), str(release)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    answers = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(answers) == 1
    assert content_of(Path(answers.pop().decode().strip())) == content_of(release)
    assert not list((tmp_path / "kept" / ".incomplete").iterdir())


FULL = """
import resource, sys
from pathlib import Path
from code_worker.errors import ArtifactError
from code_worker.releases.artifacts import LocalArtifacts
resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
try:
    LocalArtifacts(Path(sys.argv[1])).put(Path(sys.argv[2]))
except ArtifactError as error:
    print(error)
"""


@row(
    "F34",
    injection="a release outgrows RLIMIT_FSIZE",
    expected="a typed error, the releases before intact, nothing else",
)
def test_a_disk_that_fills_up_leaves_the_releases_before(release: Path, tmp_path: Path, seen: Seen) -> None:
    root = tmp_path / "kept"
    store = LocalArtifacts(root)
    store.put(release)
    other = tmp_path / "other"
    write_plain_release(other, notes="another")
    before = content_of(root)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(root), str(other)], capture_output=True, text=True, check=True, timeout=120
    )
    assert "cannot write release" in done.stdout
    assert "too large" in done.stdout
    left = {name for name in content_of(root) if not name.endswith(".lock")}
    assert left == {name for name in before if not name.endswith(".lock")}
    assert len(store.list()) == 1
    seen(releases_left=1, half_written=0)


def test_a_release_that_is_dropped_is_gone_and_can_be_stored_again(kept: Kept, release: Path) -> None:
    name = release_id(read_manifest(release)[1])
    kept.store.put(release)
    kept.store.fetch(name)
    assert kept.store.drop(name)
    assert kept.store.list() == []
    assert not kept.store.exists(name)
    with pytest.raises(ArtifactError):
        kept.store.fetch(name)
    assert not kept.store.drop(name)
    kept.store.put(release)
    assert kept.store.list() == [name]


def test_the_settings_choose_the_store(tmp_path: Path) -> None:
    assert isinstance(open_artifacts(Settings(data_dir=tmp_path)), LocalArtifacts)
    assert isinstance(open_artifacts(Settings(data_dir=tmp_path, artifacts="s3://bucket/p/")), S3Artifacts)
    with pytest.raises(ConfigurationError, match="names no bucket"):
        open_artifacts(Settings(data_dir=tmp_path, artifacts="s3://"))


def test_of_a_bucket_that_keeps_versions_every_version_of_a_release_is_dropped(
    s3_server: S3Server, bucket: str, release: Path, tmp_path: Path
) -> None:
    client = s3_server.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    artifacts = S3Artifacts(f"s3://{bucket}/kept", s3_settings(s3_server), cache=tmp_path / "cache")
    for _ in range(2):
        location = artifacts.put(release)
    assert artifacts.drop(location.rpartition("/")[2])
    left = client.list_object_versions(Bucket=bucket)
    assert not left.get("Versions")
    assert not left.get("DeleteMarkers")
