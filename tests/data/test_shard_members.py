"""Which members of a shard are images, and what says what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from code_worker.data.datasets.examples import FAKE, REAL, Example, Skipped
from code_worker.data.datasets.shards import shard_examples
from code_worker.errors import ImageRejectedError
from code_worker.images.decode import inspect
from code_worker.images.listing import NO_IMAGE
from code_worker.settings import LimitSettings
from tests.data.shard_files import picture, write_shard


def read(path: Path) -> tuple[list[Example], list[Skipped]]:
    skipped: list[Skipped] = []
    return list(shard_examples([path], max_bytes=1 << 20, skipped=skipped)), skipped


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.tar").write_bytes(pointer)
    _, (lost,) = read(tmp_path / "a.tar")
    assert lost.reason == "cannot be read: it is a Git LFS pointer: `git lfs pull` fetches the file"
    ((example,), _) = read(write_shard(tmp_path / "b.tar", {"1.real.jpg": pointer}))
    with pytest.raises(ImageRejectedError, match="a Git LFS pointer"):
        inspect(example.read(), LimitSettings())


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_that_are_no_images_are_counted_and_named(tmp_path: Path, mode: str) -> None:
    members = {}
    for number in range(3):
        members |= {f"./._{number}.real.jpg": bytes(168), f"./{number}.real.jpg": picture(number)}
    members |= {"__MACOSX/0.real.jpg": bytes(168), "0.notes.md": b"# Notes on what is in here", "1.txt": b""}
    examples, skipped = read(write_shard(tmp_path / "mac-0.tar", members, mode=mode))
    assert [example.read() for example in examples] == [picture(number) for number in range(3)]
    assert [(one.reason, one.files, one.some[0]) for one in skipped] == [
        ("hidden", 4, "./._0.real.jpg"),
        (NO_IMAGE, 2, "0.notes.md"),
    ]
    assert not any(one.is_loss for one in skipped)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_classic_records_are_labelled_by_their_class(tmp_path: Path, mode: str) -> None:
    members = {
        "a/0.jpg": picture(0),
        "a/0.cls": b"0\n",
        "a/1.png": picture(1),
        "a/1.cls": b"1",
        "2": picture(2),
        "2.cls": b"fake",
    }
    members |= {"3.jpg": picture(3), "3.json": b'{"label": "generated"}', "3.txt": b"a caption of some length"}
    examples, skipped = read(write_shard(tmp_path / "train-000.tar", members, mode=mode))
    assert [(one.label, one.collection, one.group) for one in examples] == [
        (REAL, "train", "train-000.tar/a/0"),
        (FAKE, "train", "train-000.tar/a/1"),
        (FAKE, "train", "train-000.tar/2"),
        (FAKE, "train", "train-000.tar/3"),
    ]
    assert [one.read() for one in examples] == [picture(number) for number in range(4)]
    assert [(one.files, one.some) for one in skipped] == [(1, ("3.txt",))]


def test_classic_records_that_nothing_labels_are_told(tmp_path: Path) -> None:
    members = {"0.jpg": picture(0), "1.jpg": picture(1), "1.cls": b"7", "2.cls": b"1"}
    members |= {"3.jpg": picture(3), "3.real.jpg": picture(4), "4.jpg": picture(5), "4.json": b'{"label": true}'}
    examples, skipped = read(write_shard(tmp_path / "a.tar", members))
    assert [(one.label, one.read()) for one in examples] == [(REAL, picture(4))]
    assert [(one.key.rpartition(":")[2], one.reason.partition(":")[0]) for one in skipped] == [
        ("0", "nothing says what it is"),
        ("1", "label is '7'; it must be real (or 0) or fake (or 1)"),
        ("2", "a record without an image"),
        ("3.jpg", "its name says neither real nor fake, as others of its record do"),
        ("4", "label is 'True'; it must be real (or 0) or fake (or 1)"),
    ]


@pytest.mark.parametrize("name", ["/", "a/.", "//x", "x." * 40, "real", ".fake"])
def test_an_odd_name_of_a_member_harms_nobody(tmp_path: Path, name: str) -> None:
    members = {name: picture(1), "0.real.jpg": picture(2)}
    examples, _ = read(write_shard(tmp_path / "a.tar", members))
    assert [one.read() for one in examples] == [picture(2)]
