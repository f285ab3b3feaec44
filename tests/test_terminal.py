"""What a terminal is shown of what strangers wrote."""

from __future__ import annotations

import sys

import pytest

from code_worker.system.terminal import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x07", "a\\e[2J\\x07"),
        ("a\r\nerased: all\tb", "a\\r\\nerased: all\\tb"),
        ("\x9b31m\x85\x7f", "\\x9b31m\\x85\\x7f"),
        ("\u202egpj.exe\u2066\u200f", "\\u202egpj.exe\\u2066\\u200f"),
        ("one\u2028two", "one\\u2028two"),
        ("caf\udce9.jpg\ud83d", "caf\\xe9.jpg\\ud83d"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_a_terminal_would_act_on_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text", ["C:\\new\\table.png", "Übung – 図 👩\u200d👧 می\u200cخواهم", "s3://b/a%20b?versionId=1"]
)
def test_names_in_any_writing_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


def test_no_control_character_and_no_direction_mark_is_left() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    left = printable(every)
    assert not [one for one in left if ord(one) < 0x20 or 0x7F <= ord(one) < 0xA0 or 0xD800 <= ord(one) < 0xE000]
    assert not set(left) & set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def test_a_traceback_keeps_its_lines() -> None:
    assert printable_lines("Traceback:\n\tin f\n  a\x1b[0m") == "Traceback:\n\tin f\n  a\\e[0m"
