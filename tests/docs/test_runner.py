from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import Block, Reader, blocks_of


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def reader(tmp_path: Path) -> Reader:
    directory = tmp_path / "home"
    directory.mkdir()
    return Reader(directory, {"GREETING": "hello"}, ready="up")


def test_blocks_are_found_with_their_line_and_language(tmp_path: Path) -> None:
    text = "# Title\n\n```sh\necho 1\n```\n\n```python\nprint(2)\n```\n"
    assert blocks_of(page(tmp_path, text)) == [
        Block("page.md", 3, "sh", "echo 1\n"),
        Block("page.md", 7, "python", "print(2)\n"),
    ]


@pytest.mark.parametrize("text", ["```ruby\nputs 1\n```\n", "```\nnothing said\n```\n"])
def test_a_block_that_cannot_be_run_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="cannot run"):
        blocks_of(page(tmp_path, text))


def test_a_fence_that_is_never_closed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never closed"):
        blocks_of(page(tmp_path, "```sh\necho 1\n"))


def test_blocks_share_a_directory_and_an_environment(tmp_path: Path) -> None:
    with reader(tmp_path) as somebody:
        somebody.run(Block("p", 1, "sh", 'echo "$GREETING" > note.txt\n'))
        assert somebody.run(Block("p", 2, "python", "print(open('note.txt').read())\n")).strip() == "hello"


def test_a_block_with_a_file_name_is_written(tmp_path: Path) -> None:
    with reader(tmp_path) as somebody:
        somebody.run(Block("p", 1, "python", "# file: lib/greet.py\nWORD = 'hi'\n"))
        assert somebody.run(Block("p", 2, "sh", "cd lib && python -c 'import greet; print(greet.WORD)'\n")) == "hi\n"


@pytest.mark.parametrize(
    ("info", "code"),
    [
        ("sh", "false\necho later\n"),
        ("sh", "false | true\n"),
        ("sh", "echo $NOT_SET_ANYWHERE\n"),
        ("python", "raise SystemExit(3)\n"),
        ("toml", 'devise = "cpu"\n'),
        ("toml", "[worker]\nconcurrency = 0\n"),
        ("sh", "make no-such-target\n"),
    ],
)
def test_a_block_that_fails_is_noticed(tmp_path: Path, info: str, code: str) -> None:
    with reader(tmp_path) as somebody, pytest.raises(AssertionError, match="p:1 ended with"):
        somebody.run(Block("p", 1, info, code))


def test_settings_that_are_accepted_pass(tmp_path: Path) -> None:
    with reader(tmp_path) as somebody:
        somebody.run(Block("p", 1, "toml", 'device = "cpu"\n[worker]\nconcurrency = 2\n'))


def test_a_background_block_runs_until_the_page_ends(tmp_path: Path) -> None:
    program = "python -c \"import signal; signal.signal(2, lambda *_: exit(0)); print('up'); signal.pause()\"\n"
    somebody = reader(tmp_path)
    with somebody:
        assert "up" in somebody.run(Block("p", 1, "sh background", program))
    assert somebody.close() == [0]


def test_a_background_block_that_ends_at_once_is_noticed(tmp_path: Path) -> None:
    with reader(tmp_path) as somebody, pytest.raises(AssertionError, match="ended with 0"):
        somebody.run(Block("p", 1, "sh background", "true\n"))
