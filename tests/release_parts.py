"""Releases that need no model: a few small files and the manifest that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from code_worker.releases.integrity import describe_files
from code_worker.releases.manifest import (
    MANIFEST_NAME,
    EncoderEntry,
    HeadEntry,
    Manifest,
    Preprocessing,
    Source,
    encoder_digest,
    head_digest,
    write_manifest,
)

FILES = {
    "encoder/config.json": b'{"width": 192}',
    "encoder/model.safetensors": bytes(range(256)) * 40,
    "heads/linear/weights.npz": b"coefficients",
}


def plain_manifest(directory: Path, *, notes: str = "") -> Manifest:
    """The manifest of a directory whose files lie under `encoder/` and `heads/linear/`."""
    files = describe_files(directory, leave_out={MANIFEST_NAME})
    encoder = tuple(name for name in files if name.startswith("encoder/"))
    linear = tuple(name for name in files if name.startswith("heads/linear/"))
    return Manifest(
        created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        source=Source(uri="a test"),
        encoder=EncoderEntry(
            config={"width": 192}, files=encoder, sha256=encoder_digest(encoder, files, Preprocessing())
        ),
        heads={
            "linear": HeadEntry(
                plugin_head="linear",
                target="code_worker_heads.linear:LinearHead",
                distribution="code-worker",
                distribution_version="0",
                files=linear,
                sha256=head_digest(linear, files, {}),
            )
        },
        files=files,
        notes=notes,
    )


def write_plain_release(directory: Path, *, files: Mapping[str, bytes] = FILES, notes: str = "") -> str:
    """Writes a release of opaque files into `directory`; returns the manifest's sha256."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return write_manifest(directory, plain_manifest(directory, notes=notes))
