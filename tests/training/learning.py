"""A deployment that learns: a champion with a tiny encoder, and a labelled store of tiny images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from code_worker.data.kept_copies import open_kept
from code_worker.encoder.architecture import VitConfig, expected_shapes
from code_worker.encoder.loop import EncoderLoop
from code_worker.encoder.torch_engine import Engine
from code_worker.encoder.weights import EncoderWeights
from code_worker.images.decode import decode
from code_worker.plugins import Plugins, load_plugins
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source
from code_worker.releases.registry import Registry, open_registry
from code_worker.settings import Settings
from code_worker.store import retention
from code_worker.store.engine import Session, Store
from code_worker.store.ids import uuid7
from code_worker.store.learning import image_groups, kept_images, labels, runs
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.label_rules import split_of
from code_worker.store.learning.labels import NewLabel
from code_worker.training import snapshot as snapshots
from code_worker.training.snapshot import Snapshot

TINY = VitConfig(image_size=32, patch_size=8, width=64, depth=1, heads=2, mlp_width=64)
REAL = "real"
OLD, NEW = "reddener", "bluer"

SECRET = bytes(32)
"""That decides the part of an image."""


def picture(kind: str, number: int) -> bytes:
    """A PNG of 32 × 32 pixels: noise is real; noise with too much of one colour stands for what a generator makes."""
    rng = np.random.default_rng([number, len(kind)])
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    if kind != REAL:
        channel = 0 if kind == OLD else 2
        pixels[..., channel] = 160 + pixels[..., channel] // 3
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pictures(kind: str, count: int, *, first: int = 0) -> list[bytes]:
    return [picture(kind, number) for number in range(first, first + count)]


def is_held_out(sha256: str) -> bool:
    """Returns whether an image that `label` labels is in the hold-out: one that is in a group of its own."""
    group = image_groups._group_id(SECRET, image_groups._of_bytes(sha256))
    return split_of(group, SECRET) == "holdout"


def held_out(kind: str, count: int, *, wanted: bool) -> Iterator[bytes]:
    """So many pictures that are in the hold-out, or that are not."""
    found, number = 0, 10_000
    while found < count:
        data = picture(kind, number)
        number += 1
        if is_held_out(hashlib.sha256(data).hexdigest()) == wanted:
            found += 1
            yield data


def tiny_weights(seed: int = 0) -> EncoderWeights:
    """An untrained encoder of 60,000 parameters whose embeddings tell the kinds of picture apart."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in expected_shapes(TINY).items():
        values = (rng.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(0.3)
        is_scale = "norm" in name and name.endswith("weight")
        state[name] = torch.from_numpy(values + np.float32(1) if is_scale else values)
    return EncoderWeights(TINY, state, f"untrained, seed {seed}")


def registry_of(settings: Settings, store: Store, plugins: Plugins | None = None) -> Registry:
    return open_registry(settings, store=store, plugins=plugins or load_plugins(settings))


def build_champion(directory: Path, *, heads: Iterable[str] = ("linear",), notes: str = "") -> Path:
    """A release that learned noise and one generator, and never saw the other; other notes make another release."""
    settings = Settings()
    plugins = load_plugins(settings)
    weights = tiny_weights()
    data = [*pictures(REAL, 60, first=5000), *pictures(OLD, 60, first=5000)]
    crops = np.stack([decode(one, settings.limits)[0] for one in data])
    known = np.repeat([0, 1], 60).astype(np.int8)
    with EncoderLoop(Engine(weights, device="cpu"), streams=1) as loop:
        embeddings = loop.embed(crops)
    fitted = {}
    for name in heads:
        head = plugins.head_class(name)()
        rows = known == 0 if head.one_class else known >= 0
        fitted[name] = head.fit(embeddings[rows], known[rows])
    build_from_parts(
        directory, weights, fitted, plugins, ReleaseFacts(source=Source(uri="a test"), toy=True, notes=notes)
    )
    return directory


def promote_champion(settings: Settings, store: Store, directory: Path) -> str:
    """Registers a release directory and makes it the champion."""
    registry = registry_of(settings, store)
    release = registry.add(directory)
    registry.promote(release, by="test")
    return release


def label(
    settings: Settings,
    store: Store,
    images: Iterable[bytes],
    said: str,
    *,
    generator: str | None = None,
    by: str = "alice",
) -> list[str]:
    """Keeps the images and labels them; returns their hashes.

    Each is in a group of its own, and the same images are in the same part in every run of a test.
    """
    kept = open_kept(settings)
    hashes = [kept.put(data) for data in images]
    rows = [KeptImage(sha256, 1, "png", 32, 32, f"s3://b/{sha256}") for sha256 in hashes]
    new = [NewLabel(sha256, said, by, "api", generator=generator) for sha256 in hashes]

    def write(session: Session) -> None:
        image_groups.begin_with(session, SECRET)
        image_groups.lock(session)
        kept_images.note_kept(session, rows)
        labels.add(session, new)
        image_groups.place(session, dict.fromkeys(hashes))

    store.run(write)
    return hashes


def hold_out(store: Store, hashes: Iterable[str]) -> None:
    """Puts labelled images into groups of the hold-out, by the names of records: as a caller could by luck."""
    numbers = count()

    def write(session: Session) -> None:
        image_groups.lock(session)
        for sha256 in hashes:
            while True:
                image_groups.place(session, {sha256: f"record {next(numbers)}"})
                if image_groups.places(session, [sha256])[sha256].split == "holdout":
                    break
                image_groups.forget(session, [sha256])

    store.run(write)


def forget(store: Store, hashes: Sequence[str]) -> None:
    """What retention does to the rows once labels are old, as if the files of their copies were gone then."""
    assert store.run(lambda session: retention.forget_labels(session, hashes, days=0)) == len(hashes)
    store.run(lambda session: kept_images.dropped(session, hashes))


def label_world(settings: Settings, store: Store, *, real: int = 60, old: int = 40, new: int = 40) -> None:
    """Enough of everything that a refit is due and has something to gain: the new generator."""
    label(settings, store, pictures(REAL, real), "real")
    label(settings, store, pictures(OLD, old), "fake", generator=OLD)
    label(settings, store, pictures(NEW, new), "fake", generator=NEW)


def learn(store: Store, taken: Snapshot, release: str, base: str | None) -> None:
    """A run that made this release from that one, by this snapshot."""
    run_id = uuid7()

    def write(session: Session) -> None:
        run = runs.start(session, id=run_id, kind="refit", by="a", owner="a:1", config={}, base_release=base)
        assert run is not None
        snapshots.freeze(session, taken)
        runs.note(session, run.lease, snapshot_id=taken.id, candidate=release)
        runs.finish(session, run.lease, "rejected")

    store.run(write)


def learning_settings(directory: Path, **training: object) -> Settings:
    """Of a deployment whose hold-out may be small and whose training takes seconds."""
    short = {"epochs": 2, "steps_per_epoch": 3, "records": 8, "warmup_epochs": 0.0, "loader_processes": 0, **training}
    schedule = {"min_holdout": 8}
    # A dozen images of a class prove little: what is tested here is the way of a run, not the gate's rule.
    gate = {"max_regression": 0.3, "error": 0.2}
    return Settings(data_dir=directory, device="cpu", training=short, schedule=schedule, gate=gate)


__all__ = [
    "NEW",
    "OLD",
    "REAL",
    "build_champion",
    "forget",
    "held_out",
    "hold_out",
    "is_held_out",
    "label",
    "label_world",
    "learn",
    "learning_settings",
    "picture",
    "pictures",
    "promote_champion",
    "registry_of",
    "tiny_weights",
]
