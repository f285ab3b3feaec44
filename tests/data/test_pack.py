"""Packing: what is written reads back as what was read, and nothing half written is left."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from code_worker.data.datasets.examples import FAKE, REAL, Example, Held, Skipped
from code_worker.data.datasets.open import open_examples, siblings_are_neighbours
from code_worker.data.datasets.pack import Packed, bring_together, pack
from code_worker.errors import ConfigurationError, DatasetError, StorageError
from code_worker.settings import LimitSettings, Settings
from code_worker.store.engine import Store
from tests.data.label_acts import Place
from tests.data.shard_files import picture, published_record, write_shard


def example(seed: int, label: int = FAKE, *, kind: str = "JPEG", **facts: str | None) -> Example:
    return Example(f"image {seed}", label, Held(picture(seed, kind)), **facts)


def packed(examples: list[Example], out: Path, **options: int) -> tuple[Packed, list[Skipped]]:
    skipped: list[Skipped] = []
    return pack(examples, out, limits=LimitSettings(), skipped=skipped, **options), skipped


def opened(out: Path) -> list[Example]:
    skipped: list[Skipped] = []
    found = list(open_examples(str(out), settings=Settings(), skipped=skipped))
    assert not skipped
    return found


def names(out: Path) -> list[str]:
    found = []
    for shard in sorted(out.iterdir()):
        with tarfile.open(shard) as tar:
            found += tar.getnames()
    return found


def test_what_is_read_back_is_what_was_packed(tmp_path: Path) -> None:
    examples = [
        example(1, REAL, group="a/g-1", collection="coco", variant="augm"),
        example(2, kind="PNG", group="a/g-1", generator="sd-xl", variant="augm"),
        example(3, kind="TIFF", group="a/g-1", generator="my own", collection="c", variant="augm"),
        example(4, kind="WEBP"),
        example(5, REAL, kind="GIF", collection="ünïcode"),
    ]
    done, skipped = packed(examples, tmp_path / "out")
    assert not skipped
    assert (done.images, done.records) == (5, 3)
    assert done.size_bytes == sum(path.stat().st_size for path in done.shards)
    back = sorted(opened(tmp_path / "out"), key=lambda one: [made.read() for made in examples].index(one.read()))
    for made, read in zip(examples, back, strict=True):
        data = made.read()
        assert read.read() == data
        assert read.sha256 == hashlib.sha256(data).hexdigest()
        assert replace(read, key=made.key, sha256=None) == made


def test_records_have_the_published_names(tmp_path: Path) -> None:
    packed(
        [
            example(1, REAL, group="g"),
            example(2, group="g", generator="sd-1.4"),
            example(3, group="g", generator="flux"),
            example(4, group="g", generator="sd-1.4"),
            example(5, kind="PNG"),
        ],
        tmp_path / "out",
    )
    assert names(tmp_path / "out") == [
        "000000000-g.gen_1.jpg",
        "000000000-g.gen_4.jpg",
        "000000000-g.gen_5.jpg",
        "000000000-g.json",
        "000000000-g.real.jpg",
        "000000001.gen_4.png",
        "000000001.json",
    ]
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        member = tar.extractfile("000000000-g.json")
        assert member is not None
        facts = json.loads(member.read())
    assert facts["images"]["gen_4"]["generator"] == "flux"
    assert facts["images"]["real"] == {
        "sha256": hashlib.sha256(picture(1)).hexdigest(),
        "generator": None,
        "collection": None,
    }


def test_a_group_that_no_record_can_hold_becomes_several(tmp_path: Path) -> None:
    examples = [example(1, REAL, group="g"), example(2, REAL, group="g")]
    examples += [example(number, group="g", generator="x") for number in range(3, 23)]
    done, _ = packed(examples, tmp_path / "out")
    assert (done.images, done.records) == (22, 3)
    assert {one.group for one in opened(tmp_path / "out")} == {"g"}


def test_packing_twice_and_packing_a_pack_gives_the_same_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path / "elsa-0000.tar", published_record(1), published_record(2))
    source = list(open_examples(str(tmp_path / "elsa-0000.tar"), settings=Settings(), skipped=[]))
    packed(source, tmp_path / "one")
    packed(source, tmp_path / "two")
    packed(opened(tmp_path / "one"), tmp_path / "three")
    first, second, third = ((tmp_path / name / "shard-000000.tar").read_bytes() for name in ("one", "two", "three"))
    assert first == second == third


def test_a_shard_ends_before_the_record_that_would_make_it_too_large(tmp_path: Path) -> None:
    examples = [example(number, REAL) for number in range(6)]
    done, _ = packed(examples, tmp_path / "out", shard_bytes=8 << 10)
    assert len(done.shards) > 1
    assert [path.name for path in done.shards] == [f"shard-{number:06d}.tar" for number in range(len(done.shards))]
    for shard in done.shards:
        with tarfile.open(shard) as tar:
            assert tar.getmembers()[-1].offset_data <= 8 << 10
    assert [one.read() for one in opened(tmp_path / "out")] == [one.read() for one in examples]
    alone, _ = packed(examples, tmp_path / "small", shard_bytes=1)
    assert len(alone.shards) == 6


def test_siblings_of_a_tree_are_brought_together_first(tmp_path: Path) -> None:
    for seed, name in enumerate(("gen_0/a", "gen_0/b", "gen_1/a", "gen_1/b", "real/a", "real/b")):
        path = tmp_path / "d3" / "augm" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
    source = str(tmp_path / "d3")
    assert not siblings_are_neighbours(source)
    done, _ = packed(list(bring_together(open_examples(source, settings=Settings(), skipped=[]))), tmp_path / "out")
    assert (done.images, done.records) == (6, 2)
    assert names(tmp_path / "out")[:4] == [
        "000000000-a.gen_0.jpg",
        "000000000-a.gen_1.jpg",
        "000000000-a.json",
        "000000000-a.real.jpg",
    ]
    assert siblings_are_neighbours(str(tmp_path / "out"))


def test_images_that_cannot_be_used_are_told_and_the_others_packed(tmp_path: Path) -> None:
    def gone() -> bytes:
        raise DatasetError("it is gone")

    examples = [
        Example("gone", REAL, gone, group="g"),
        Example("text", FAKE, Held(b"no image at all"), group="g"),
        Example("nothing", FAKE, Held(b"")),
        example(1, group="g"),
    ]
    done, skipped = packed(examples, tmp_path / "out")
    assert done.images == 1
    assert [lost.key for lost in skipped] == ["gone", "text", "nothing"]
    assert skipped[0].reason == "it is gone"


def test_a_storage_that_fails_as_a_whole_ends_the_packing(tmp_path: Path) -> None:
    def away() -> bytes:
        raise StorageError("the storage is away")

    with pytest.raises(StorageError):
        packed([example(1), Example("x", REAL, away)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_nothing_could_be_packed(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nothing to pack: no usable image \(1 skipped\)"):
        packed([Example("x", REAL, Held(b"x"))], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_something_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    packed([example(1)], tmp_path / "out")
    before = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    with pytest.raises(ConfigurationError, match="is not empty"):
        packed([example(2)], tmp_path / "out")
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == before
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError):
            packed([example(2)], place)


def test_images_of_the_labelled_store_keep_their_groups(sqlite_store: Store, tmp_path: Path) -> None:
    place, rng = Place(tmp_path, sqlite_store), np.random.default_rng(0)
    for number in range(6):
        path = place.photos / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 64)).save(path)
        place.labeller.label(str(path), "fake" if number % 2 else "real", by="alice", group=f"post {number // 2}")
    found = list(open_examples("labels:", settings=place.settings, skipped=[], store=sqlite_store))
    assert len({one.group for one in found}) == 3
    pack(bring_together(found), tmp_path / "out", limits=LimitSettings(), skipped=[])
    assert sorted((str(one.sha256), one.group) for one in opened(tmp_path / "out")) == sorted(
        (str(one.sha256), one.group) for one in found
    )
