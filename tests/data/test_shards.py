"""Shards in the published form: what is whole is used, what is not is told."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import pytest

from code_worker.data.datasets.examples import FAKE, REAL, Example, Skipped
from code_worker.data.datasets.open import open_examples
from code_worker.data.datasets.shards import expand, read_records, shard_examples
from code_worker.errors import DatasetError
from code_worker.settings import Settings
from tests.data.shard_files import facts_member, picture, published_record, tar_bytes, write_shard

MAX_BYTES = 1 << 20
END = 2 * tarfile.BLOCKSIZE


def read(*paths: Path, max_bytes: int = MAX_BYTES) -> tuple[list[Example], list[Skipped]]:
    skipped: list[Skipped] = []
    return list(shard_examples(paths, max_bytes=max_bytes, skipped=skipped)), skipped


def members_of(examples: list[Example]) -> list[str]:
    return [example.key.rpartition(":")[2].partition(".")[2] for example in examples]


def test_a_published_record_gives_its_real_image_and_four_named_generators(tmp_path: Path) -> None:
    record = published_record(7)
    shard = write_shard(tmp_path / "elsa_v2-0000.tar", record)
    examples, skipped = read(shard)
    assert not skipped
    assert [(example.label, example.generator) for example in examples] == [
        (FAKE, "deepfloyd-if"),
        (FAKE, "sd-1.4"),
        (FAKE, "sd-2.1"),
        (FAKE, "sd-xl"),
        (REAL, None),
    ]
    assert {example.collection for example in examples} == {"elsa_v2"}
    assert len({example.group for example in examples}) == 1
    for example in examples:
        assert example.key.startswith(f"{shard}:")
        assert example.read() == record[example.key.rpartition(":")[2]]


def test_caption_and_url_are_read_whatever_their_bytes(tmp_path: Path) -> None:
    (record,) = read_records(write_shard(tmp_path / "a.tar", published_record(7)), max_bytes=MAX_BYTES, skipped=[])
    assert record.caption == "caf\ufffd at night"
    assert record.url == "https://example.org/a.jpg"


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("CompVis/stable-diffusion-v1-4", "sd-1.4"),
        ("stabilityai/stable-diffusion-2-1-base", "sd-2.1"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sd-xl"),
        ("DeepFloyd/IF-II-L-v1.0", "deepfloyd-if"),
        ("stabilityai/sdxl-turbo", "sdxl-turbo"),
        ("Some Lab/My Model v2", "my-model-v2"),
    ],
)
def test_the_model_that_a_record_names_decides_over_the_published_order(
    tmp_path: Path, model: str, slug: str
) -> None:
    shard = write_shard(tmp_path / "a.tar", published_record(1, gens=1) | facts_member(1, {"model_gen0": model}))
    assert [example.generator for example in read(shard)[0]] == [slug, None]


def test_other_prefixes_suffixes_and_numbers_are_read(tmp_path: Path) -> None:
    names = ["part/x.y.real.WEBP", "part/x.y.gen_9.tiff", "part/x.y.fake.img", "0.gen0"]
    shard = write_shard(tmp_path / "coco-12.tar", {name: picture(1) for name in names})
    examples, skipped = read(shard)
    assert [(example.label, example.generator) for example in examples] == [
        (REAL, None),
        (FAKE, "gen_9"),
        (FAKE, None),
        (FAKE, "deepfloyd-if"),
    ]
    assert {example.collection for example in examples} == {"coco"}
    assert not skipped


def test_members_of_a_record_need_not_be_neighbours(tmp_path: Path) -> None:
    first, second = published_record(1), published_record(2)
    mixed = sorted({**first, **second}.items(), key=lambda item: item[0].partition(".")[2])
    (tmp_path / "a.tar").write_bytes(tar_bytes(mixed))
    examples, _ = read(tmp_path / "a.tar")
    assert [example.group for example in examples[:5]] == [examples[0].group] * 5
    assert len({example.group for example in examples}) == 2


def test_a_compressed_shard_reads_the_same(tmp_path: Path) -> None:
    records = published_record(1), published_record(2)
    plain, _ = read(write_shard(tmp_path / "a.tar", *records))
    packed, skipped = read(write_shard(tmp_path / "a.tar.gz", *records, mode="w:gz"))
    assert not skipped
    assert [example.read() for example in packed] == [example.read() for example in plain]
    assert members_of(packed) == members_of(plain)


def test_an_example_can_be_sent_to_another_process(tmp_path: Path) -> None:
    (example, *_), _ = read(write_shard(tmp_path / "a.tar", published_record(1)))
    assert pickle.loads(pickle.dumps(example)).read() == example.read()


def cut_in_a_body(whole: bytes) -> bytes:
    return whole[: whole.rindex(b"elsa_v2__train__2.real.jpg") + tarfile.BLOCKSIZE + 100]


def cut_in_a_header(whole: bytes) -> bytes:
    return whole[: whole.rindex(b"elsa_v2__train__2.real.jpg") + 100]


def cut_between_members(whole: bytes) -> bytes:
    return whole[: whole.rindex(b"elsa_v2__train__2.real.jpg")]


def damaged_header(whole: bytes) -> bytes:
    at = whole.rindex(b"elsa_v2__train__2.real.jpg")
    return whole[:at] + b"\xff" * tarfile.BLOCKSIZE + whole[at + tarfile.BLOCKSIZE :]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("fault", [cut_in_a_body, cut_in_a_header, cut_between_members, damaged_header])
def test_of_a_shard_cut_short_what_is_whole_is_used_and_the_rest_told_once(
    tmp_path: Path, fault, packed: bool
) -> None:
    whole = tar_bytes([*published_record(1).items(), *published_record(2).items()])
    data = fault(whole)
    (tmp_path / "a.tar").write_bytes(gzip.compress(data) if packed else data)
    examples, skipped = read(tmp_path / "a.tar")
    assert len(examples) == 9
    (lost,) = skipped
    assert lost.key == str(tmp_path / "a.tar")
    assert any(word in lost.reason for word in ("cut short", "damaged"))
    assert "elsa_v2__train__2" in lost.reason


def test_a_compressed_shard_whose_own_end_is_missing_gives_what_comes_before(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "a.tgz", published_record(1), published_record(2), mode="w:gz").read_bytes()
    (tmp_path / "a.tgz").write_bytes(whole[: len(whole) // 2])
    examples, skipped = read(tmp_path / "a.tgz")
    assert 0 < len(examples) < 10
    assert "cut short" in skipped[0].reason


@pytest.mark.parametrize("content", [b"", b"no tar at all", os.urandom(2000), b"\x1f\x8bno gzip"])
def test_what_is_no_tar_is_told_and_the_next_shard_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    examples, skipped = read(tmp_path / "a.tar", write_shard(tmp_path / "b.tar", published_record(1)))
    assert len(examples) == 5
    assert [lost.key for lost in skipped] == [str(tmp_path / "a.tar")]


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    (tmp_path / "directory.tar").mkdir()
    examples, skipped = read(tmp_path / "missing.tar", tmp_path / "directory.tar")
    assert not examples
    assert [lost.reason for lost in skipped] == ["cannot be read: there is no such file"] * 2


def test_an_empty_a_large_and_a_repeated_image_are_left_out_alone(tmp_path: Path) -> None:
    record = published_record(1)
    names = list(record)
    record[names[2]] = b""
    record[names[3]] = bytes(5000)
    members = [*record.items(), (names[4], picture(99))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    examples, skipped = read(tmp_path / "a.tar", max_bytes=4999)
    assert members_of(examples) == ["gen_2.png", "gen_3.jpg", "real.jpg"]
    assert examples[0].read() == record[names[4]]
    assert [lost.reason for lost in skipped] == ["an empty file", "over 4999 bytes", "a second gen_2 of its record"]
    assert [lost.key.partition(".gen_")[2] for lost in skipped] == ["0.png", "1.jpg", "2.png"]


def test_a_record_without_a_real_image_gives_its_fakes_and_one_without_any_is_told(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", published_record(1, real=False), published_record(2, gens=0, real=False))
    examples, skipped = read(shard)
    assert [example.label for example in examples] == [FAKE] * 4
    assert skipped == [Skipped(f"{shard}:elsa_v2__train__2", "a record without an image")]


@pytest.mark.parametrize("facts", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_record_whose_facts_cannot_be_read_is_left_out(tmp_path: Path, facts: bytes) -> None:
    broken = published_record(1) | {"elsa_v2__train__1.json": facts}
    examples, skipped = read(write_shard(tmp_path / "a.tar", broken, published_record(2)))
    assert len(examples) == 5
    assert [lost.key for lost in skipped] == [f"{tmp_path / 'a.tar'}:elsa_v2__train__1"]


@pytest.mark.parametrize(
    "facts", [{"images": 3, "group": 7}, {"images": {"real": {"sha256": 1, "collection": []}}}, {"model_gen0": {}}]
)
def test_facts_of_the_wrong_kind_are_as_good_as_none(tmp_path: Path, facts: dict[str, object]) -> None:
    examples, skipped = read(write_shard(tmp_path / "a.tar", published_record(1) | facts_member(1, facts)))
    assert [example.generator for example in examples][:4] == ["deepfloyd-if", "sd-1.4", "sd-2.1", "sd-xl"]
    assert not skipped


def test_bytes_that_differ_from_the_hash_that_a_shard_promises_are_refused(tmp_path: Path) -> None:
    facts = facts_member(1, {"images": {"real": {"sha256": "0" * 64}}})
    examples, _ = read(write_shard(tmp_path / "a.tar", published_record(1, gens=0) | facts))
    with pytest.raises(DatasetError, match="not those of sha256 000000000000"):
        examples[0].read()


def test_names_are_words_and_never_places(tmp_path: Path) -> None:
    names = ["/etc/elsa__1.real.jpg", "../../up__2.real.jpg", "bell\x07\x1b[31m__3.real.jpg", "\udcff__4.real.jpg"]
    before = {path.name for path in tmp_path.parent.iterdir()}
    shard = write_shard(tmp_path / "a.tar", {name: picture(number) for number, name in enumerate(names)})
    examples, _ = read(shard)
    assert [example.read() for example in examples] == [picture(number) for number in range(4)]
    assert all(example.key.isprintable() for example in examples)
    assert [example.collection for example in examples] == ["elsa", "up", "bell\\x07\\e[31m", "\\xff"]
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_links_devices_and_sparse_files_are_no_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"k{kind.decode()}.real.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        directory = tarfile.TarInfo("d.real.jpg")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    examples, skipped = read(tmp_path / "a.tar")
    assert not examples
    assert [lost.reason for lost in skipped] == ["not a plain file"] * 4


def header(size_field: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims any size, with the right checksum."""
    block = bytearray(tarfile.TarInfo("k.real.jpg").tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size_field
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "block",
    [
        header(b"\xff" + b"\xff" * 9 + b"\xfe\x00"),  # minus 512, back to itself
        header(b"\x80" + struct.pack(">11s", b"\x7f" * 11)),
        header(b"77777777777\0", kind=tarfile.XHDTYPE),
        header(b"77777777777\0", kind=tarfile.GNUTYPE_LONGNAME),
    ],
    ids=["negative", "astronomical", "pax", "longname"],
)
def test_a_header_that_lies_about_its_size_ends_the_shard(tmp_path: Path, block: bytes, packed: bool) -> None:
    data = tar_bytes(published_record(1).items())[:-END].rstrip(b"\0")
    data += bytes(-len(data) % tarfile.BLOCKSIZE) + block + bytes(1 << 17)
    (tmp_path / "a.tar").write_bytes(gzip.compress(data) if packed else data)
    examples, skipped = read(tmp_path / "a.tar")
    assert len(examples) == 5
    assert len([lost for lost in skipped if lost.key == str(tmp_path / "a.tar")]) <= 1
    assert skipped


def test_a_tar_replaced_since_it_was_listed_is_noticed(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", published_record(1))
    examples, _ = read(shard)
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(DatasetError, match="shorter than when it was listed"):
        examples[-1].read()
    shard.unlink()
    with pytest.raises(DatasetError, match="No such file"):
        examples[-1].read()


def test_patterns_stand_for_shards_in_their_order(tmp_path: Path) -> None:
    for name in ("s-08.tar", "s-09.tar", "s-10.tar", "val.tar", "[x].tar"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand(str(tmp_path / pattern))]

    assert names("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert names("s-{10..9}.tar") == ["s-10.tar", "s-09.tar"]
    assert names("{val,s-09}.tar") == ["val.tar", "s-09.tar"]
    assert names("s-*.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert names("[x].tar") == ["[x].tar"]
    for pattern in ("{0..99999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(DatasetError, match="over 100000 shards"):
            names(pattern)


def test_a_directory_of_shards_is_read_and_what_lies_beside_them_is_told(tmp_path: Path) -> None:
    write_shard(tmp_path / "b.tar", published_record(2))
    write_shard(tmp_path / "a.tar", published_record(1))
    (tmp_path / "more").mkdir()
    (tmp_path / "one.PNG").touch()
    (tmp_path / "README.md").touch()
    skipped: list[Skipped] = []
    examples = list(open_examples(str(tmp_path), settings=Settings(), skipped=skipped))
    assert [Path(example.key.partition(":")[0]).name for example in examples[::5]] == ["a.tar", "b.tar"]
    assert [lost.key for lost in skipped] == [str(tmp_path / "more"), str(tmp_path / "one.PNG")]


def test_a_shard_of_a_pattern_that_is_missing_is_told(tmp_path: Path) -> None:
    write_shard(tmp_path / "s-1.tar", published_record(1))
    skipped: list[Skipped] = []
    examples = list(open_examples(str(tmp_path / "s-{0..1}.tar"), settings=Settings(), skipped=skipped))
    assert len(examples) == 5
    assert skipped == [Skipped(str(tmp_path / "s-0.tar"), "cannot be read: there is no such file")]


def test_only_so_many_examples_are_read_as_asked_for(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", published_record(1))
    examples = open_examples(str(tmp_path / "a.tar"), settings=Settings(), skipped=[], limit=3)
    assert members_of(list(examples)) == ["gen_0.png", "gen_1.jpg", "gen_2.png"]


def test_shards_without_anything_usable_are_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    skipped: list[Skipped] = []
    examples = open_examples(str(tmp_path / "a.tar"), settings=Settings(), skipped=skipped)
    with pytest.raises(DatasetError, match=r"no usable image; 1 skipped, the first: .*a\.tar"):
        list(examples)
    assert len(skipped) == 1


def test_shards_in_a_bucket_must_be_copied_first() -> None:
    with pytest.raises(DatasetError, match="copy it here"):
        open_examples("s3://data/shard-0000.tar", settings=Settings(), skipped=[])
