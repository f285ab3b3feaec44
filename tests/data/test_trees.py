"""Directories whose names are the labels, in the layouts that detectors are measured on."""

from __future__ import annotations

import gzip
import os
from contextlib import closing
from pathlib import Path

import pytest

from code_worker.data.datasets.examples import FAKE, REAL, Example, Skipped
from code_worker.data.datasets.open import open_examples
from code_worker.errors import DatasetError, ImageRejectedError
from code_worker.images.listing import NO_IMAGE
from code_worker.settings import S3Settings, Settings
from tests.data.shard_files import picture
from tests.servers import S3Server


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def read(root: Path | str, settings: Settings | None = None) -> tuple[list[Example], list[Skipped]]:
    skipped: list[Skipped] = []
    return list(open_examples(str(root), settings=settings or Settings(), skipped=skipped)), skipped


def facts(root: Path, example: Example) -> tuple[str, int, str | None, str | None, str | None]:
    name = str(Path(example.key).relative_to(root))
    assert example.read() == name.encode()
    return name, example.label, example.generator, example.collection, example.variant


def test_the_test_tree_of_d3_gives_generators_variants_and_siblings(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "d3",
        *(
            f"{variant}/{kind}/{stem}.png"
            for variant in ("augm", "no_augm")
            for kind in ("gen_0", "gen_1", "gen_2", "gen_3", "real")
            for stem in ("a", "b")
        ),
    )
    examples, skipped = read(root)
    assert not skipped
    assert [facts(root, example) for example in examples[:10:2]] == [
        ("augm/gen_0/a.png", FAKE, "deepfloyd-if", "d3", "augm"),
        ("augm/gen_1/a.png", FAKE, "sd-1.4", "d3", "augm"),
        ("augm/gen_2/a.png", FAKE, "sd-2.1", "d3", "augm"),
        ("augm/gen_3/a.png", FAKE, "sd-xl", "d3", "augm"),
        ("augm/real/a.png", REAL, None, "d3", "augm"),
    ]
    assert [example.variant for example in examples[10:]] == ["no_augm"] * 10
    assert {example.group for example in examples} == {"a", "b"}


def test_a_part_of_the_tree_of_d3_is_read_the_same(tmp_path: Path) -> None:
    tree(tmp_path / "no_augm", "real/a.jpg", "gen_2/a.jpg")
    examples, _ = read(tmp_path / "no_augm")
    assert [(example.generator, example.variant, example.group) for example in examples] == [
        ("sd-2.1", "no_augm", "a"),
        (None, "no_augm", "a"),
    ]
    (example,), _ = read(tmp_path / "no_augm" / "gen_2")
    assert (example.label, example.generator) == (FAKE, "sd-2.1")


def test_benchmarks_with_numbered_labels_are_named_after_their_generators(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "bench",
        "biggan/0_real/1.jpg",
        "biggan/1_fake/1.png",
        "progan/cat/0_real/2.jpg",
        "progan/cat/1_fake/2.jpg",
        "stargan/1_fake/nature/3.jpg",
    )
    examples, skipped = read(root)
    assert [facts(root, example) for example in examples] == [
        ("biggan/0_real/1.jpg", REAL, None, "biggan", None),
        ("biggan/1_fake/1.png", FAKE, "biggan", "biggan", None),
        ("progan/cat/0_real/2.jpg", REAL, None, "progan", None),
        ("progan/cat/1_fake/2.jpg", FAKE, "progan", "progan", None),
        ("stargan/1_fake/nature/3.jpg", FAKE, "stargan", "stargan", None),
    ]
    assert {example.group for example in examples} == {None}
    assert not skipped
    inner, _ = read(root / "biggan")
    assert [(example.label, example.generator) for example in inner] == [(REAL, None), (FAKE, "biggan")]


def test_plain_trees_may_name_generators_collections_and_splits(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "mine",
        "fake/1.jpg",
        "fake/sdxl/2.JPEG",
        "fake/gen_1/3.webp",
        "real/4.tif",
        "real/coco/5.gif",
        "train/REAL/6.bmp",
        "train/FAKE/7.jpg",
        "glide/val/ai/8.png",
        "glide/val/nature/9.png",
    )
    examples, _ = read(root)
    assert {facts(root, example)[:4] for example in examples} == {
        ("fake/1.jpg", FAKE, None, "mine"),
        ("fake/sdxl/2.JPEG", FAKE, "sdxl", "mine"),
        ("fake/gen_1/3.webp", FAKE, "sd-1.4", "mine"),
        ("real/4.tif", REAL, None, "mine"),
        ("real/coco/5.gif", REAL, None, "coco"),
        ("train/REAL/6.bmp", REAL, None, "mine"),
        ("train/FAKE/7.jpg", FAKE, None, "mine"),
        ("glide/val/ai/8.png", FAKE, "glide", "glide"),
        ("glide/val/nature/9.png", REAL, None, "glide"),
    }


def test_the_order_is_that_of_the_names(tmp_path: Path) -> None:
    names = ["real/b/2.jpg", "real/a/9.jpg", "real/c.jpg", "fake/z.jpg", "real/b/1.jpg"]
    examples, _ = read(tree(tmp_path / "t", *names))
    assert [str(Path(example.key).relative_to(tmp_path / "t")) for example in examples] == sorted(names)


def test_other_files_are_passed_over_and_images_nobody_labelled_are_told(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "t",
        "real/1.jpg",
        "real/notes.txt",
        "real/.hidden.jpg",
        ".cache/real/1.jpg",
        "__MACOSX/real/1.jpg",
        "logo.png",
        "real/x/fake/2.jpg",
    )
    examples, skipped = read(root)
    assert [Path(example.key).name for example in examples] == ["1.jpg"]
    assert [(Path(lost.key).name, lost.reason[:29]) for lost in skipped if lost.is_loss] == [
        ("logo.png", "no directory above it says wh"),
        ("2.jpg", "directories above it say both"),
    ]
    assert [(one.reason, one.files, one.some) for one in skipped if not one.is_loss] == [
        ("hidden", 3, (".cache", "__MACOSX", "real/.hidden.jpg")),
        (NO_IMAGE, 1, ("real/notes.txt",)),
    ]


def test_an_image_is_told_by_its_content_where_its_name_says_nothing(tmp_path: Path) -> None:
    root = tmp_path / "t"
    (root / "real").mkdir(parents=True)
    kinds = {
        "a": "JPEG",
        "b.img": "PNG",
        "c.jpg_large": "JPEG",
        "d.txt": "GIF",
        "e.bin": "BMP",
        "f": "TIFF",
        "g.0": "WEBP",
    }
    for name, kind in kinds.items():
        (root / "real" / name).write_bytes(picture(1, kind))
    others = {
        "BM.txt": b"BMW and others are no bitmaps, though they begin like one",
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512),
        "empty": b"",
        "short": b"\xff\xd8\xff\xe0",
        "photo.jpg.gz": gzip.compress(picture(1)),
        ".DS_Store": bytes(40),
    }
    for name, content in others.items():
        (root / "real" / name).write_bytes(content)
    os.mkfifo(root / "real" / "pipe")
    examples, skipped = read(root)
    assert [Path(example.key).name for example in examples] == sorted(kinds)
    assert {one.reason: set(one.some) for one in skipped} == {
        NO_IMAGE: {f"real/{name}" for name in others if name != ".DS_Store"},
        "hidden": {"real/.DS_Store"},
        "no regular file": {"real/pipe"},
    }


def test_many_files_that_are_no_images_are_counted_and_some_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "t", "real/1.jpg", *(f"real/{number:02}.json" for number in range(30)))
    (passed,) = read(root)[1]
    assert (passed.files, passed.some[::9]) == (30, ("real/00.json", "real/09.json"))
    assert str(passed).startswith(f"passed over 30 files in {root} ({NO_IMAGE}): real/00.json, ")
    assert str(passed).endswith("real/09.json, …")


def test_links_lead_nowhere_outside_and_loops_end(tmp_path: Path) -> None:
    root = tree(tmp_path / "t", "real/1.jpg")
    outside = tree(tmp_path / "other", "secret.jpg", "real/9.jpg")
    (root / "real" / "2.jpg").symlink_to(outside / "secret.jpg")
    (root / "real" / "3.jpg").symlink_to(root / "real" / "1.jpg")
    (root / "real" / "loop").symlink_to(root)
    (root / "fake").symlink_to(outside)
    (root / "real" / "4.jpg").symlink_to("nowhere")
    examples, skipped = read(root)
    assert [Path(example.key).name for example in examples] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert [Path(lost.key).name for lost in skipped] == ["fake", "loop"]
    assert examples[2].read() == b"real/1.jpg"
    for refused in (examples[1], examples[3]):
        with pytest.raises(ImageRejectedError):
            refused.read()


def test_a_tree_may_itself_be_named_by_a_link(tmp_path: Path) -> None:
    tree(tmp_path / "t", "real/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "t")
    (example,), _ = read(tmp_path / "link")
    assert example.read() == b"real/1.jpg"


def test_directories_nested_deeper_than_python_calls_are_walked(tmp_path: Path) -> None:
    tree(tmp_path / "t", "real/1.jpg")
    deep = str(tmp_path / "t" / "real")
    for _ in range(1010):
        deep += "/d"
        os.mkdir(deep)  # noqa: PTH102 - a Path of a thousand parts is slow
    examples, skipped = read(tmp_path / "t")
    os.removedirs(deep)  # what removes old test directories calls itself for each level
    assert len(examples) == 1
    assert not skipped


def test_a_name_that_is_no_text_is_read_and_shown_escaped(tmp_path: Path) -> None:
    directory = tree(tmp_path / "t", "real/1.jpg") / "real"
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff\n.jpg")).write_bytes(b"odd")
    examples, _ = read(tmp_path / "t")
    assert examples[1].key == f"{directory}/\\xff\\n.jpg"
    assert examples[1].read() == b"odd"


def test_a_file_that_is_gone_or_no_file_is_told_when_it_is_read(tmp_path: Path) -> None:
    root = tree(tmp_path / "t", "real/1.jpg")
    os.mkfifo(root / "real" / "2.jpg")
    examples, _ = read(root)
    (root / "real" / "1.jpg").unlink()
    for example in examples:
        with pytest.raises(ImageRejectedError):
            example.read()


@pytest.mark.parametrize("names", [(), ("notes.txt",), ("a.jpg", "b.jpg")])
def test_a_directory_without_labelled_images_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(DatasetError, match="holds no usable image"):
        read(tree(tmp_path / "t", *names))


@pytest.mark.parametrize("source", ["missing", "no\0name", "x" * 5000, "{a,b}.tar", "*.tar", ""])
def test_what_is_not_there_is_refused_with_the_known_forms(source: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError):
        read(source)


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.ZIP").touch()
    with pytest.raises(DatasetError, match=r"a\.ZIP is an archive: unpack it and name its directory"):
        read(tmp_path / "a.ZIP")


def test_a_file_of_another_form_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.zap").touch()
    with pytest.raises(DatasetError, match=r"no data set of a known form: labels: .*hf:owner/name.*\.tar"):
        read(tmp_path / "a.zap")


def test_a_bucket_is_read_as_a_tree(s3_server: S3Server) -> None:
    with closing(s3_server.client()) as s3:
        s3.create_bucket(Bucket="trees")
        for name in ("set/real/1.jpg", "set/fake/sdxl/2", "set/real/._1.jpg", "other/real/3.jpg"):
            s3.put_object(Bucket="trees", Key=name, Body=picture(len(name)))
        for number in range(12):
            s3.put_object(
                Bucket="trees", Key=f"set/fake/{number}.txt", Body=b"" if number % 2 else b"a house at night"
            )
    settings = Settings(
        s3=S3Settings(
            endpoint_url=s3_server.url,
            region="us-east-1",
            access_key_id=s3_server.access_key_id,
            secret_access_key=s3_server.secret_access_key,
            path_style=True,
            buckets=("trees",),
        )
    )
    examples, skipped = read("s3://trees/set/", settings)
    assert [(example.label, example.generator, example.collection) for example in examples] == [
        (FAKE, "sdxl", "set"),
        (REAL, None, "set"),
    ]
    assert [example.read() for example in examples] == [
        picture(len("set/fake/sdxl/2")),
        picture(len("set/real/1.jpg")),
    ]
    assert {(one.reason, one.files, one.some[0]) for one in skipped} == {
        (NO_IMAGE, 12, "fake/0.txt"),
        ("hidden", 1, "real/._1.jpg"),
    }
    with pytest.raises(DatasetError, match="cannot list s3://closed/"):
        read("s3://closed/", settings)
