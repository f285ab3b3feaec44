"""A `real`/`fake` tree of images that the toy release tells apart."""

from __future__ import annotations

from pathlib import Path

from tests.training.labelled_noise import noise_files


def write_tree(directory: Path, count: int, *, seed: int = 0, flipped: int = 0) -> Path:
    """`real/camera/`, `fake/enlarger/` and `fake/doubler/`; the first `flipped` of each class lie in the other's."""
    for place, (data, label) in enumerate(noise_files(count, seed)):
        fake = bool(label) != (place // 2 < flipped)
        kind = ("fake", ("enlarger", "doubler")[place // 2 % 2]) if fake else ("real", "camera")
        target = directory.joinpath(*kind, f"{place:03}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return directory
