"""Signed releases: with a key configured, what nobody signed is neither imported nor promoted nor loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr

from code_worker.cli.common.release_runtime import load as load_to_scan
from code_worker.errors import ConfigurationError, IntegrityError, NotAllowedError, SignatureError
from code_worker.heads import Head
from code_worker.plugins import InstalledPlugin, Plugins
from code_worker.releases.artifacts import ArtifactStore, LocalArtifacts, S3Artifacts
from code_worker.releases.importing import ImportOptions, build_release
from code_worker.releases.integrity import SIGNATURE_NAME, check, sign
from code_worker.releases.loading import load_release
from code_worker.releases.manifest import MANIFEST_NAME, read_manifest, release_id, write_manifest
from code_worker.releases.registry import Registry
from code_worker.settings import RoleSettings, S3Settings, Settings, load_settings
from code_worker.store import audit
from code_worker.store.engine import Store
from tests.cli.conftest import Cli
from tests.parity import ParitySet
from tests.servers import S3Server

OURS, FORMER, THEIRS = (SecretStr(name * 32) for name in "oft")
MANIFEST = b'{"format": 1}\n'


@pytest.fixture(params=["directory", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "directory":
        return LocalArtifacts(tmp_path / "kept")
    server: S3Server = request.getfixturevalue("s3_server")
    server.client().create_bucket(Bucket="signed")
    settings = S3Settings(
        endpoint_url=server.url,
        region="us-east-1",
        access_key_id=SecretStr(server.access_key_id),
        secret_access_key=SecretStr(server.secret_access_key),
        path_style=True,
    )
    return S3Artifacts(f"s3://signed/{tmp_path.name}", settings, cache=tmp_path / "cache")


Open = Callable[..., Registry]


@pytest.fixture
def opened(sqlite_store: Store, artifacts: ArtifactStore, plugins: Plugins) -> Open:
    def open_with(*keys: SecretStr, roles: RoleSettings | None = None) -> Registry:
        return Registry(sqlite_store, artifacts, plugins, roles or RoleSettings(), keys)

    return open_with


def signed_by(directory: Path, key: SecretStr) -> Path:
    (directory / SIGNATURE_NAME).write_bytes(sign((directory / MANIFEST_NAME).read_bytes(), [key]))
    return directory


def test_a_signature_is_of_one_manifest_by_one_key() -> None:
    made = sign(MANIFEST, [OURS, FORMER])
    check(MANIFEST, made, [OURS], "r-1")
    check(MANIFEST, made, [THEIRS, OURS], "r-1")
    with pytest.raises(SignatureError, match="signed by the key"):
        check(MANIFEST, made, [FORMER], "r-1")
    with pytest.raises(SignatureError, match="not of this manifest"):
        check(MANIFEST + b" ", made, [OURS], "r-1")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"key": 1, "algorithm": "hmac-sha256", "signature": "x"}',
        b'{"key": "k", "algorithm": "none", "signature": ""}',
        b'{"key": "k", "algorithm": "hmac-sha256", "signature": "\xc3\xa9"}',
        b"[" * 4000,
    ],
)
def test_what_is_no_signature_is_refused(content: bytes) -> None:
    with pytest.raises(SignatureError, match="wrongly signed"):
        check(MANIFEST, content, [OURS], "r-1")


def test_without_keys_nothing_is_asked_for_and_nothing_can_be_signed() -> None:
    check(MANIFEST, None, [], "r-1")
    with pytest.raises(ConfigurationError, match="SIGNING_KEYS"):
        sign(MANIFEST, [])


def test_a_signature_says_nothing_of_the_key() -> None:
    assert OURS.get_secret_value().encode() not in sign(MANIFEST, [OURS])


def test_what_was_made_here_is_signed_and_loads(opened: Open, copy: Path) -> None:
    ours = opened(OURS)
    id_ = ours.add(copy)
    assert ours.promote(id_, by="olga") is None
    assert opened().load(id_).id == id_, "who has no key asks for none"
    assert opened(THEIRS, OURS).load(id_).id == id_, "a former key is accepted"
    with pytest.raises(SignatureError, match="signed by the key"):
        opened(THEIRS).load(id_)


def test_an_unsigned_release_is_neither_loaded_nor_promoted_until_an_operator_signs_it(
    opened: Open, copy: Path, sqlite_store: Store
) -> None:
    id_ = opened().add(copy)
    opened().promote(id_, by="olga")
    ours = opened(OURS)
    for act in (
        lambda: ours.load(id_),
        lambda: ours.promote(id_, by="olga"),
        lambda: ours.challenge(id_, by="olga"),
    ):
        with pytest.raises(SignatureError, match=f"{id_} is not signed: .*releases sign"):
            act()
    with pytest.raises(NotAllowedError):
        opened(OURS, roles=RoleSettings(operators=("olga",))).sign(id_, by="eve")
    ours.sign(id_, by="olga")
    assert ours.load(id_).id == id_
    entry = sqlite_store.run(lambda session: audit.last(session, action="release.sign"))
    assert entry is not None
    assert (entry.actor, entry.subject) == ("olga", id_)


def test_a_release_directory_of_others_must_be_signed_to_be_imported(
    opened: Open, copy: Path, sqlite_store: Store, plugins: Plugins, tmp_path: Path
) -> None:
    ours = opened(OURS)
    with pytest.raises(SignatureError, match="is not signed"):
        ours.import_(str(copy))
    with pytest.raises(SignatureError, match="signed by the key"):
        ours.import_(str(signed_by(copy, THEIRS)))
    assert ours.list() == []
    id_ = ours.import_(str(signed_by(copy, OURS)))
    assert ours.load(id_).id == id_
    assert opened(OURS, THEIRS).import_(str(signed_by(copy, THEIRS))) == id_


def test_a_manifest_that_was_changed_after_signing_is_refused(opened: Open, copy: Path) -> None:
    signed_by(copy, OURS)
    manifest, _ = read_manifest(copy)
    write_manifest(copy, manifest.model_copy(update={"notes": "mine now"}))
    with pytest.raises(SignatureError, match="not of this manifest"):
        opened(OURS).import_(str(copy))


def test_who_owns_database_and_storage_cannot_swap_a_release(
    opened: Open, copy: Path, artifacts: ArtifactStore
) -> None:
    """They can register another one, move the alias, and copy the signature of the one that was good."""
    good = opened(OURS).add(copy)
    manifest, _ = read_manifest(copy)
    write_manifest(copy, manifest.model_copy(update={"notes": "swapped"}))
    evil = opened().add(copy)
    signature = artifacts.signature(good)
    assert signature is not None
    artifacts.put_signature(evil, signature)
    opened().promote(evil, by="mallory")
    with pytest.raises(SignatureError, match="not of this manifest"):
        opened(OURS).load(evil)


def test_the_signature_is_no_file_of_the_release(copy: Path, plugins: Plugins, tmp_path: Path) -> None:
    _, before = read_manifest(copy)
    signed_by(copy, OURS)
    assert build_release(str(copy), plugins, tmp_path / "made") == before
    (copy / "more.txt").write_text("not listed")
    with pytest.raises(IntegrityError, match=r"not listed: more\.txt"):
        build_release(str(copy), plugins, tmp_path / "again")


def test_scanning_with_a_directory_asks_for_the_signature_too(copy: Path, plugins: Plugins) -> None:
    settings = Settings(signing_keys=(OURS,))
    with pytest.raises(SignatureError, match="is not signed"):
        load_to_scan(settings, str(copy), plugins)
    loaded, _ = load_to_scan(settings, str(signed_by(copy, OURS)), plugins)
    assert loaded.id == release_id(read_manifest(copy)[1])


def test_a_published_form_is_signed_when_it_is_taken(
    parity_set: ParitySet, opened: Open, artifacts: ArtifactStore
) -> None:
    id_ = opened(OURS).import_(str(parity_set.directory))
    assert artifacts.signature(id_) is not None


def test_what_was_imported_before_without_a_key_is_imported_anew(
    parity_set: ParitySet, opened: Open, artifacts: ArtifactStore, plugins: Plugins, tmp_path: Path
) -> None:
    (bare := tmp_path / "heads").mkdir()
    options = ImportOptions(heads_dir=bare)
    build_release(str(parity_set.directory), plugins, tmp_path / "built", options)
    manifest = read_manifest(tmp_path / "built")[0]
    write_manifest(tmp_path / "built", manifest.model_copy(update={"created_at": datetime(2026, 1, 2, tzinfo=UTC)}))
    unsigned = opened().add(tmp_path / "built")
    signed = opened(OURS).import_(str(parity_set.directory), options)
    assert signed != unsigned
    assert artifacts.signature(signed) is not None
    assert opened(OURS).import_(str(parity_set.directory), options) == signed


def test_a_short_key_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE_WORKER_SIGNING_KEYS", json.dumps(["short-and-secret"]))
    with pytest.raises(ConfigurationError, match="32 characters or more") as refused:
        load_settings()
    assert "short-and-secret" not in str(refused.value)


def test_the_shell_signs(sqlite_cli: Cli, copy: Path, tmp_path: Path) -> None:
    sqlite_cli.env["CODE_WORKER_ARTIFACTS"] = str(tmp_path / "kept")
    id_ = json.loads(sqlite_cli("releases", "import", str(copy), "--json").stdout)["id"]
    keys = {"CODE_WORKER_SIGNING_KEYS": json.dumps([OURS.get_secret_value()])}
    refused = sqlite_cli("releases", "promote", id_, env=keys)
    assert (refused.status, f"{id_} is not signed" in refused.stderr) == (2, True)
    assert sqlite_cli("releases", "sign", id_, env=keys).stdout == f"{id_} is signed\n"
    assert sqlite_cli("releases", "promote", id_, env=keys).status == 0


def test_a_directory_that_is_swapped_after_the_check_is_not_loaded(
    sqlite_store: Store, tmp_path: Path, plugins: Plugins, toy_release_dir: Path
) -> None:
    """Whoever may write to the artifact store puts another release in the place of the one that was checked."""
    other = tmp_path / "other"
    shutil.copytree(toy_release_dir, other)
    manifest, _ = read_manifest(other)
    write_manifest(other, manifest.model_copy(update={"notes": "nobody signed this"}))

    class Swapped(LocalArtifacts):
        def signature(self, release: str) -> bytes | None:
            found = super().signature(release)
            shutil.rmtree(self.root / release)
            shutil.copytree(other, self.root / release)
            return found

    ours = Registry(sqlite_store, LocalArtifacts(tmp_path / "kept"), plugins, RoleSettings(), [OURS])
    release = ours.add(toy_release_dir)
    assert ours.load(release).id == release
    with pytest.raises(IntegrityError, match="the manifest is not the expected one"):
        Registry(sqlite_store, Swapped(tmp_path / "kept"), plugins, RoleSettings(), [OURS]).load(release)


def test_files_that_are_swapped_while_they_are_read_are_not_used(
    tmp_path: Path, plugins: Plugins, toy_release_dir: Path
) -> None:
    signed = tmp_path / "release"
    shutil.copytree(toy_release_dir, signed)
    signed_by(signed, OURS)

    class Swapping(Plugins):
        def head_class(self, name: str) -> type[Head]:
            (signed / MANIFEST_NAME).write_bytes((signed / MANIFEST_NAME).read_bytes() + b"\n")
            return plugins.head_class(name)

        def provider(self, name: str) -> InstalledPlugin:
            return plugins.provider(name)

    load_release(signed, plugins, keys=[OURS])
    with pytest.raises(IntegrityError, match="the manifest is not the expected one"):
        load_release(signed, Swapping(), keys=[OURS])
