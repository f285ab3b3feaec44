"""Hashes of files and signatures of manifests: what integrity and provenance are built on."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr

from code_worker.errors import ConfigurationError, IntegrityError, SignatureError

_CHUNK = 2**20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OnBytes = Callable[[int], None]


class FileEntry(BaseModel):
    """Content of one file: sha256 and size in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Sha256
    size: int = Field(ge=0)


def digest_of(sha256_by_name: Mapping[str, str], extra: Mapping[str, JsonValue] | None = None) -> str:
    """One sha256 over the sha256 of several files (keyed by relative path) and `extra` facts."""
    plain = {"files": dict(sha256_by_name), "extra": dict(extra or {})}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path, on_bytes: OnBytes | None = None) -> FileEntry:
    """Sha256 and size of a file's content, read in pieces; `on_bytes` hears of each piece's size."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        # In pieces: weights may be larger than the memory that is left.
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return FileEntry(sha256=digest.hexdigest(), size=size)


def files_below(directory: Path) -> list[str]:
    """Relative POSIX paths of the regular files below `directory`, sorted.

    Raises:
        IntegrityError: a symbolic link or anything else that is neither file nor directory.
    """
    return sorted(_walk(directory, ""))


def _walk(directory: Path, prefix: str) -> Iterator[str]:
    # By entries and not by `rglob`: a link to a directory must be seen as a link, never walked into.
    with os.scandir(directory) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise IntegrityError(f"{entry.path} is neither a file nor a directory; links are not followed")


def describe_files(directory: Path, leave_out: Collection[str] = ()) -> dict[str, FileEntry]:
    """Hash and size of every file below `directory` but those named in `leave_out`."""
    return {name: hash_file(directory / name) for name in files_below(directory) if name not in leave_out}


SIGNATURE_NAME: Final = "manifest.sig"
MAX_SIGNATURE_BYTES: Final = 4096
_ALGORITHM: Final = "hmac-sha256"
_PURPOSE: Final = b"code_worker release manifest 1\0"


def signature_in(directory: Path) -> bytes | None:
    """Returns what stands in a release directory's `manifest.sig`, or None."""
    path = directory / SIGNATURE_NAME
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        return file.read(MAX_SIGNATURE_BYTES)


def sign(manifest: bytes, keys: Sequence[SecretStr]) -> bytes:
    """The signature by the first key, as the content of `manifest.sig`.

    Raises:
        ConfigurationError: no key is configured.
    """
    if not keys:
        raise ConfigurationError("no key to sign with: set CODE_WORKER_SIGNING_KEYS")
    key = _bytes(keys[0])
    made = {"algorithm": _ALGORITHM, "key": _name(key), "signature": _hmac(key, manifest)}
    return (json.dumps(made, sort_keys=True, indent=2) + "\n").encode()


def check(manifest: bytes, signature: bytes | None, keys: Sequence[SecretStr], what: str) -> None:
    """Returns when one of the keys signed this manifest, or when there are no keys and nothing is asked for.

    Raises:
        SignatureError: no signature, one by another key, or not of this manifest; `what` names the release.
    """
    if not keys:
        return
    if signature is None:
        raise SignatureError(f"{what} is not signed: make sure where it is from, then `code-worker releases sign` it")
    # The name of the key only finds it; what proves anything is the HMAC.
    name, stated = _read(signature, what)
    known = {_name(key): key for key in map(_bytes, keys)}
    if name not in known:
        raise SignatureError(f"{what} is signed by the key {name}, which is none of CODE_WORKER_SIGNING_KEYS")
    # In constant time: how long it takes must not tell how much of a guess was right.
    if not hmac.compare_digest(_hmac(known[name], manifest), stated):
        raise SignatureError(f"{what} is wrongly signed: the signature is not of this manifest")


def _read(signature: bytes, what: str) -> tuple[str, str]:
    try:
        found = json.loads(signature)
        name, algorithm, stated = found["key"], found["algorithm"], found["signature"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SignatureError(f"{what} is wrongly signed: {SIGNATURE_NAME} cannot be read") from None
    if algorithm != _ALGORITHM or not isinstance(name, str) or not isinstance(stated, str) or not stated.isascii():
        raise SignatureError(f"{what} is wrongly signed: {SIGNATURE_NAME} is not of the form {_ALGORITHM}")
    return name, stated


def _bytes(key: SecretStr) -> bytes:
    return key.get_secret_value().encode()


def _name(key: bytes) -> str:
    """Returns what a key is called; says nothing of the key itself."""
    # A hash of its own purpose: it tells nothing about HMACs by this key.
    return hashlib.sha256(b"code_worker key name\0" + key).hexdigest()[:16]


def _hmac(key: bytes, manifest: bytes) -> str:
    # The purpose keeps a signature of anything else by the same key from passing for one of a manifest.
    return hmac.new(key, _PURPOSE + manifest, hashlib.sha256).hexdigest()
