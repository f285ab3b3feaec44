"""What measures is right itself: images that differ, ratios within a round, bars that are said to be missed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench.images import FORMS, Kind, make_images
from bench.rounds import alternate, compared, rows_of


@pytest.mark.parametrize("form", FORMS)
def test_images_have_the_size_and_form_asked_for_and_none_is_twice(form: str, tmp_path: Path) -> None:
    paths = make_images(tmp_path, Kind(300, 260, form), 4)
    for path in paths:
        with Image.open(path) as image:
            assert (image.size, image.format, image.mode) == ((300, 260), FORMS[form][0], "RGB")
            assert bool(image.info.get("progressive")) == (form == "progressive")
    assert len({path.read_bytes() for path in paths}) == len(paths)


def test_the_same_images_are_made_again(tmp_path: Path) -> None:
    kind = Kind(256, 256, "jpeg")
    first, second = make_images(tmp_path / "a", kind, 2), make_images(tmp_path / "b", kind, 2)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("text", ["640x480", "640-jpeg", "640x480-gif", "x480-png"])
def test_a_kind_that_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SystemExit, match="such as 640x480-jpeg"):
        Kind.parse(text)


def test_every_other_round_goes_backwards() -> None:
    asked: list[str] = []
    alternate(["a", "b"], 3, lambda name: asked.append(name) or 1.0)  # type: ignore[func-returns-value]
    assert asked == ["a", "b", "b", "a", "a", "b"]


def test_ratios_are_taken_within_rounds_and_a_missed_bar_is_said_to_be_missed() -> None:
    found = compared({"ours": [2.0, 6.0, 4.0], "theirs": [1.0, 2.0, 4.0]}, "ours", {"theirs": 2.5})
    assert found["theirs"]["ours_is_times"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert not found["theirs"]["met"]
    assert [row[-1] for row in rows_of("images", found)] == ["", "≥ 2.5: MISSED"]


def test_a_part_runs_by_its_name_and_its_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench", "decoding", "--quick", "--json", str(out)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kind = json.loads(out.read_text())["parts"]["decoding"]["kinds"]["640x480-jpeg"]
    assert kind["differing_pixels"] == 0
    assert "bar" in kind["decoders"]["Pillow"]
    assert "640x480-jpeg" in printed


def test_an_unknown_part_is_refused() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "nothing"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part nothing" in done.stderr
