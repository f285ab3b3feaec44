from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from code_worker.data.kept_copies import open_kept
from code_worker.settings import Settings
from code_worker.store.engine import Store
from code_worker.store.learning.labels import NewLabel, add
from tests.cli.conftest import Cli
from tests.data.shard_files import picture, published_record, write_shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    broken = published_record(2) | {"elsa_v2__train__2.gen_0.png": b""}
    return write_shard(tmp_path / "elsa_v2-0000.tar", published_record(1), broken)


def test_a_data_set_is_counted_by_kind_and_what_is_broken_listed(bare_cli: Cli, shard: Path) -> None:
    ran = bare_cli("data", "show", str(shard))
    assert ran.status == 0
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert rows[0] == ["label", "generator", "collection", "variant", "images"]
    assert rows[1:6] == [
        ["fake", "deepfloyd-if", "elsa_v2", "1"],
        ["fake", "sd-1.4", "elsa_v2", "2"],
        ["fake", "sd-2.1", "elsa_v2", "2"],
        ["fake", "sd-xl", "elsa_v2", "2"],
        ["real", "elsa_v2", "2"],
    ]
    assert ran.stdout.splitlines()[-1] == "9 images: 2 real, 7 fake"
    assert ran.stderr.splitlines() == [
        f"skipped {shard}:elsa_v2__train__2.gen_0.png: an empty file",
        "1 skipped",
    ]


def test_the_counts_are_one_object_for_programs(bare_cli: Cli, shard: Path) -> None:
    ran = bare_cli("data", "show", str(shard), "--json", "--limit", "3")
    (record,) = ran.records
    assert record["images"] == 3
    assert record["kinds"][0] == {
        "label": "fake",
        "generator": "deepfloyd-if",
        "collection": "elsa_v2",
        "variant": None,
        "images": 1,
    }
    assert record["skipped"] == [{"key": f"{shard}:elsa_v2__train__2.gen_0.png", "reason": "an empty file"}]
    assert ran.stderr == ""


def test_broken_pixels_are_noticed_when_asked_to_check(bare_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t" / "real").mkdir(parents=True)
    (tmp_path / "t" / "real" / "1.jpg").write_bytes(picture(1))
    (tmp_path / "t" / "real" / "2.jpg").write_bytes(picture(1)[:300])
    assert bare_cli("data", "show", str(tmp_path / "t"), "--json").records[0]["images"] == 2
    ran = bare_cli("data", "show", str(tmp_path / "t"), "--check")
    assert ran.status == 0
    assert "1 image: 1 real, 0 fake" in ran.stdout
    assert "2.jpg: truncated" in ran.stderr


def test_no_name_reaches_the_terminal_as_it_is(bare_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t" / "real").mkdir(parents=True)
    for name in ("\x1b[31m\n.jpg", "\x1b[2J.txt", "good.jpg"):
        (tmp_path / "t" / "real" / name).write_bytes(picture(1) if name == "good.jpg" else b"no pixels")
    ran = bare_cli("data", "show", str(tmp_path / "t"), "--check")
    assert ran.status == 0
    assert r"real/\e[31m\n.jpg: unsupported_format" in ran.stderr
    assert r": real/\e[2J.txt" in ran.stderr
    assert "\x1b" not in ran.stderr


def test_a_packed_data_set_is_counted_as_before(bare_cli: Cli, shard: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = bare_cli("data", "pack", str(shard), "--out", str(out), "--shard-mb", "1")
    assert ran.status == 0
    assert ran.stdout.startswith("packed 9 images in 2 records into 1 shard (")
    assert "gen_0.png: an empty file" in ran.stderr
    before, after = (bare_cli("data", "show", str(place), "--json").records[0] for place in (shard, out))
    assert before["kinds"] == after["kinds"]
    again = bare_cli("data", "pack", str(shard), "--out", str(out))
    assert (again.status, again.stdout) == (2, "")
    assert "is not empty" in again.stderr


def test_the_labelled_store_is_packed_from_its_kept_copies(cli: Cli, store: Store, tmp_path: Path) -> None:
    kept = open_kept(Settings(data_dir=tmp_path / "data"))
    hashes = [kept.put(picture(number)) for number in range(3)]
    labels = [NewLabel(hashes[0], "real", "alice", "cli"), NewLabel(hashes[1], "fake", "alice", "cli", "sdxl")]
    labels.append(NewLabel("0" * 64, "fake", "alice", "cli"))
    store.run(lambda session: add(session, labels))
    ran = cli("data", "pack", "labels:", "--out", str(tmp_path / "out"), "--json")
    assert ran.status == 0
    (record,) = ran.records
    assert (record["images"], record["records"], record["shards"]) == (2, 2, [str(tmp_path / "out/shard-000000.tar")])
    assert [lost["key"] for lost in record["skipped"]] == ["0" * 64]
    kinds = cli("data", "show", str(tmp_path / "out"), "--json").records[0]["kinds"]
    assert [(kind["label"], kind["generator"]) for kind in kinds] == [("fake", "sdxl"), ("real", None)]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("show", "missing"), 1, "there is no such file or directory"),
        (("show", "labels::"), 1, "did you mean labels:?"),
        (("show", "labels:"), 1, "there is no database in"),
        (("show", "hf:one"), 2, "write hf:owner/name"),
        (("show", "."), 1, "holds no usable image"),
        (("pack", "empty.tar", "--out", "out"), 1, "skipped empty.tar: cut short or damaged"),
        (("show",), 2, "Missing argument"),
        (("pack", "."), 2, "Missing option '--out'"),
        (("show", ".", "--limit", "0"), 2, "Invalid value"),
    ],
)
def test_a_fault_is_one_line_and_a_status(
    bare_cli: Cli, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], status: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.tar").touch()
    (tmp_path / "empty.tar").chmod(0o644)
    ran = bare_cli("data", *arguments)
    assert (ran.status, ran.stdout) == (status, "")
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_in_words_and_leaves_nothing(shard: Path, tmp_path: Path) -> None:
    packed = ["-m", "code_worker", "data", "pack", str(shard), "--out", str(tmp_path / "packs" / "out")]
    program = f"ulimit -f 8 && exec {shlex.join([sys.executable, *packed])}"
    ran = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.splitlines()[-1].endswith("File too large; nothing of it was left")
    assert list((tmp_path / "packs").iterdir()) == []


def test_a_golden_set_is_pinned_by_bytes_and_labels_wherever_it_lies(bare_cli: Cli, tmp_path: Path) -> None:
    for root in ("here", "there"):
        for label in ("real", "fake"):
            (tmp_path / root / label).mkdir(parents=True)
            (tmp_path / root / label / f"{root}.png").write_bytes(picture(len(label) + (label == "real")))
    (tmp_path / "there" / "license.txt").write_text("These images may be measured on.")
    (tmp_path / "there" / ".DS_Store").write_bytes(bytes(40))
    pins = [bare_cli("data", "pin", str(tmp_path / root)).stdout for root in ("here", "there")]
    assert pins[0] == pins[1]
    assert len(pins[0].strip()) == 64
    (tmp_path / "there" / "real" / "there.png").rename(tmp_path / "there" / "fake" / "turned.png")
    (tmp_path / "there" / "real" / "other.png").write_bytes(picture(77))
    (changed,) = bare_cli("data", "pin", str(tmp_path / "there"), "--json").records
    assert (changed["images"], changed["sha256"] + "\n" != pins[0]) == (3, True)
    assert bare_cli("data", "pin", str(tmp_path / "nowhere")).status == 1
