"""D³ in the hub's form, from parquet files on this disk; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, Value

from code_worker.data.datasets.examples import FAKE, REAL, Example, Skipped
from code_worker.data.datasets.hub import RealUrls, parquet_examples
from code_worker.data.datasets.open import open_examples
from code_worker.data.datasets.urls import UrlSource
from code_worker.errors import ConfigurationError, DatasetError, ImageRejectedError
from code_worker.settings import LimitSettings, Settings
from tests.data.shard_files import picture

MODELS = ("DeepFloyd/IF-II-L-v1.0", "CompVis/stable-diffusion-v1-4", "stabilityai/stable-diffusion-2-1-base", "")


def row(identity: int, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": f"r{identity}",
        "original_prompt": "a cat",
        "url": f"https://10.0.0.1/{identity}.jpg",
    }
    for number, model in enumerate(MODELS):
        image = picture(identity * 10 + number, "PNG")
        made[f"image_gen{number}"] = {"bytes": image, "path": f"{identity}.png"}
        made[f"model_gen{number}"] = model
        made[f"filepath_gen{number}"] = f"images/{identity}/{number}.png"
    return made | changes


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(source: Path | str, settings: Settings | None = None, **options: Any) -> tuple[list[Example], list[Skipped]]:
    skipped: list[Skipped] = []
    made = open_examples(str(source), settings=settings or Settings(), skipped=skipped, **options)
    return list(made), skipped


def test_a_row_gives_its_generated_images_with_the_models_that_it_names(tmp_path: Path) -> None:
    path = write(tmp_path / "d3" / "train.parquet", row(1), row(2))
    examples, skipped = read(path)
    assert not skipped
    assert [(example.label, example.generator) for example in examples[:4]] == [
        (FAKE, "deepfloyd-if"),
        (FAKE, "sd-1.4"),
        (FAKE, "sd-2.1"),
        (FAKE, "sd-xl"),
    ]
    assert [example.read() for example in examples[4:]] == [picture(20 + number, "PNG") for number in range(4)]
    assert examples[0].key == f"{path}#r1.gen_0"
    assert [example.group for example in examples] == ["d3#r1"] * 4 + ["d3#r2"] * 4
    assert {example.collection for example in examples} == {"d3"}


def test_a_home_that_cannot_be_written_is_enough_for_files_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    examples, skipped = read(write(tmp_path / "train.parquet", row(1)))
    assert (len(examples), skipped) == (4, [])


def test_files_that_are_here_are_counted_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("a session"))
    examples, _ = read(write(tmp_path / "train.parquet", row(1)))
    assert (len(examples), asked) == (4, [])


def test_without_a_temporary_directory_files_are_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "train.parquet", row(1))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(DatasetError, match=r"no temporary directory: .*none"):
        read(path)


def test_a_copy_of_the_hub_repository_is_found_by_its_parquet_files(tmp_path: Path) -> None:
    write(tmp_path / "copy" / "data" / "train-00001.parquet", row(2))
    write(tmp_path / "copy" / "data" / "train-00000.parquet", row(1))
    examples, _ = read(tmp_path / "copy")
    assert [example.key.partition("#")[2] for example in examples[::4]] == ["r1.gen_0", "r2.gen_0"]
    again, _ = read(tmp_path / "copy" / "data" / "train-*.parquet")
    assert again == examples


def test_what_lies_beside_parquet_files_is_told(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.PARQUET", row(1))
    (tmp_path / "data" / "._train.PARQUET").write_bytes(bytes(168))
    (tmp_path / "README.md").write_text("what these images are")
    (tmp_path / "more").mkdir()
    (tmp_path / "sample").write_bytes(picture(1))
    examples, skipped = read(tmp_path)
    assert len(examples) == 4
    reason = "it lies beside parquet files and is not read: name it"
    assert [(one.key, one.reason) for one in skipped] == [
        (f"{tmp_path}/{name}", reason) for name in ("more", "sample")
    ]


@pytest.mark.parametrize("as_struct", [True, False])
def test_rows_of_an_image_and_its_label_are_read(tmp_path: Path, as_struct: bool) -> None:
    labels = [0, 1, 1, 2]
    rows = [
        {"image": {"bytes": picture(number), "path": None} if as_struct else picture(number), "label": label}
        for number, label in enumerate(labels)
    ]
    path = write(tmp_path / "plain" / "train.parquet", *rows, {"image": None, "label": 0})
    examples, skipped = read(path)
    assert [(one.label, one.collection, one.group) for one in examples] == [
        (REAL, "plain", None),
        (FAKE, "plain", None),
        (FAKE, "plain", None),
    ]
    assert [one.read() for one in examples] == [picture(number) for number in range(3)]
    assert [(one.key, one.reason) for one in skipped] == [
        (f"{path}#3", "label is '2'; it must be real (or 0) or fake (or 1)"),
        (f"{path}#4", "its bytes are not in the data set"),
    ]


def test_the_names_of_classes_say_which_number_is_which(tmp_path: Path) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["FAKE", "REAL"]), "generator": Value("string")})
    columns = {
        "image": [{"bytes": picture(number), "path": None} for number in range(3)],
        "label": [0, 1, -1],
        "generator": ["sdxl", "", "sdxl"],
    }
    table = pa.table(columns, schema=pa.schema(features.arrow_schema))
    pq.write_table(table, tmp_path / "named.parquet")
    examples, skipped = read(tmp_path / "named.parquet")
    assert [(one.label, one.generator) for one in examples] == [(FAKE, "sdxl"), (REAL, None)]
    assert [one.reason for one in skipped] == ["label is 'None'; it must be real (or 0) or fake (or 1)"]


def test_missing_and_large_images_are_left_out_alone(tmp_path: Path) -> None:
    large = picture(5, "PNG")
    path = write(
        tmp_path / "a.parquet",
        row(1, image_gen0=None, image_gen1={"bytes": None, "path": "/etc/passwd"}, image_gen2={"bytes": large}),
    )
    settings = Settings(limits=LimitSettings(max_bytes=len(large) - 1))
    examples, skipped = read(path, settings)
    assert [lost.key.rpartition(".")[2] for lost in skipped[:3]] == ["gen_0", "gen_1", "gen_2"]
    assert [lost.reason for lost in skipped[:2]] == ["its bytes are not in the data set"] * 2
    assert len(examples) + len(skipped) == 4


def test_a_damaged_file_is_told_and_the_next_one_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = write(tmp_path / "a.parquet", row(1)).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "b.parquet", row(2))
    write(tmp_path / "c.parquet", {"text": "another form"})
    (tmp_path / "d.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    examples, skipped = read(tmp_path)
    assert len(examples) == 4
    assert [Path(lost.key).name for lost in skipped] == ["a.parquet", "c.parquet", "d.parquet"]
    assert "columns id, image_gen0" in skipped[1].reason
    assert skipped[2].reason == "it is a Git LFS pointer: `git lfs pull` fetches the file"
    assert capfd.readouterr() == ("", "")


def test_real_images_are_read_by_url_only_when_asked_for_and_only_so_many(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", row(1), row(2, url=None), row(3), row(4))
    assert {example.label for example in read(path)[0]} == {FAKE}
    skipped: list[Skipped] = []
    urls = RealUrls(UrlSource(max_bytes=1000), 2)
    examples = list(parquet_examples([path], max_bytes=1 << 20, skipped=skipped, real_urls=urls))
    reals = [example for example in examples if example.label == REAL]
    assert [example.key.partition("#")[2] for example in reals] == ["r1.real", "r3.real"]
    assert [example.group for example in reals] == [f"{tmp_path.name}#r1", f"{tmp_path.name}#r3"]
    asked, _ = read(path, real_urls=1)
    (real,) = (example for example in asked if example.label == REAL)
    with pytest.raises(ImageRejectedError, match=r"10\.0\.0\.1 is not on the public internet"):
        real.read()


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_around(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"cannot read hf:elsaEU/ELSA_D3:train: .* download its parquet files"):
        read("hf:elsaEU/ELSA_D3:train")


@pytest.mark.parametrize("name", ["hf:", "hf:elsa", "hf:a/b/c", "hf:a/b@", "hf:a/b:train:x", "hf:../b c"])
def test_a_malformed_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="write hf:owner/name"):
        read(name)
