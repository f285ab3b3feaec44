"""Signatures of manifests: who holds a key vouches for a release, whoever keeps its files and its row.

A signature is an HMAC (RFC 2104) with SHA-256 over the manifest's bytes, in `manifest.sig` beside it. Since the
manifest holds the hash of every other file, it stands for all of them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from code_worker.errors import ConfigurationError, SignatureError

__all__ = ["MAX_SIGNATURE_BYTES", "SIGNATURE_NAME", "check", "sign", "signature_in"]

SIGNATURE_NAME: Final = "manifest.sig"
MAX_SIGNATURE_BYTES: Final = 4096
_ALGORITHM: Final = "hmac-sha256"
_PURPOSE: Final = b"code_worker release manifest 1\0"


def signature_in(directory: Path) -> bytes | None:
    """What stands in a release directory's `manifest.sig`, or None."""
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
    name, stated = _read(signature, what)
    known = {_name(key): key for key in map(_bytes, keys)}
    if name not in known:
        raise SignatureError(f"{what} is signed by the key {name}, which is none of CODE_WORKER_SIGNING_KEYS")
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
    """What a key is called; says nothing of the key itself."""
    return hashlib.sha256(b"code_worker key name\0" + key).hexdigest()[:16]


def _hmac(key: bytes, manifest: bytes) -> str:
    return hmac.new(key, _PURPOSE + manifest, hashlib.sha256).hexdigest()
