"""Shards as D³ publishes them, made on the spot, whole or with a fault."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.image_files import encoded, pixels


def picture(seed: int, kind: str = "JPEG") -> bytes:
    return encoded(pixels(40, 30, seed), kind)


def published_record(identity: int, *, gens: int = 4, real: bool = True) -> dict[str, bytes]:
    """Members of one record, by name; sizes and formats differ as they do in the published shards."""
    key = f"elsa_v2__train__{identity}"
    members = {f"{key}.caption.txt": b"caf\xe9 at night", f"{key}.url.txt": b"https://example.org/a.jpg"}
    for number in range(gens):
        kind, suffix = ("JPEG", "jpg") if number % 2 else ("PNG", "png")
        members[f"{key}.gen_{number}.{suffix}"] = picture(identity * 10 + number, kind)
    if real:
        members[f"{key}.real.jpg"] = picture(identity * 10 + 9)
    return members


def facts_member(identity: int, facts: Mapping[str, Any]) -> dict[str, bytes]:
    return {f"elsa_v2__train__{identity}.json": json.dumps(facts).encode()}


def tar_bytes(members: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_shard(path: Path, *records: Mapping[str, bytes], mode: str = "w") -> Path:
    path.write_bytes(tar_bytes([item for record in records for item in record.items()], mode))
    return path
