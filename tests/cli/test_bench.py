"""What a machine can judge, told by the command line."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from code_worker.moderation.capacity import workers_for
from code_worker.releases import building
from code_worker.releases.building import build_toy_release
from tests.cli.conftest import Cli
from tests.image_files import encoded, pixels
from tests.toy_release import write_toy_release

FULL_DEPTH = 12
RATES = ("decode_one_thread_per_s", "decode_per_s", "forward_per_s", "end_to_end_per_s")


@pytest.fixture(scope="module")
def shallow_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_release(tmp_path_factory.mktemp("shallow") / "release", depth=1)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    directory = tmp_path / "pictures"
    directory.mkdir()
    for number in range(8):
        (directory / f"{number}.jpg").write_bytes(encoded(pixels(300 + number, 260), "JPEG"))
    (directory / "broken.jpg").write_bytes(b"no image")
    return directory


def test_ones_own_images_are_measured_and_broken_ones_left_out(
    bare_cli: Cli, shallow_release: Path, pictures: Path
) -> None:
    ran = bare_cli(
        *("bench", str(pictures), "--release", str(shallow_release), "--seconds", "0.1", "--json"),
        *("--per-day", "1000000000"),
    )
    assert ran.status == 0, ran.stderr
    (facts,) = ran.records
    assert facts["images"] == 8
    for name in RATES:
        assert 0 < facts[name]["lowest"] <= facts[name]["median"] <= facts[name]["highest"]
    assert len(facts["encoder_busy"]) == 3
    assert all(0 < one <= 1 for one in facts["encoder_busy"])
    slower = "encoder" if facts["forward_per_s"]["median"] <= facts["decode_per_s"]["median"] else "decoding"
    assert facts["limit"] == slower
    assert facts["workers"] > 1


def test_without_images_and_release_it_makes_its_own(bare_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def shallower(*arguments: Any, depth: int = FULL_DEPTH, **options: Any) -> str:
        assert depth == FULL_DEPTH
        return build_toy_release(*arguments, depth=1, **options)

    monkeypatch.setattr(building, "build_toy_release", shallower)
    assert signature(build_toy_release).parameters["depth"].default == FULL_DEPTH
    ran = bare_cli("bench", "--seconds", "0.1", "--size", "320x240")
    assert ran.status == 0, ran.stderr
    assert "untrained weights of the published size" in ran.stdout
    assert "made, 320x240 JPEG" in ran.stdout
    assert "limited by" in ran.stdout


@pytest.mark.parametrize("size", ["320", "0x10", "ax1", "99999x1"])
def test_a_size_must_be_one(bare_cli: Cli, size: str) -> None:
    ran = bare_cli("bench", "--size", size)
    assert ran.status == 2
    assert "is no size such as" in ran.stderr


def test_a_directory_without_an_image_is_wrong_use(bare_cli: Cli, shallow_release: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = bare_cli("bench", str(tmp_path / "empty"), "--release", str(shallow_release))
    assert ran.status == 2
    assert "no image that can be judged" in ran.stderr


def test_workers_have_headroom() -> None:
    assert workers_for(86_400, 1.0) == 2
    assert workers_for(86_400 * 7, 10.0) == 1
    assert workers_for(1, 50.0) == 1
