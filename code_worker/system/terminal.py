"""Text of strangers as a terminal may show it: nothing in it moves the cursor, begins a line or turns the writing."""

from __future__ import annotations

import json
import re
from typing import Final

# Control characters of both blocks (an ESC, a line break, the one-byte CSI), separators of lines and paragraphs, what
# turns the direction of writing (UAX #9, and "Trojan Source", CVE-2021-42574), marks that show nothing, and halves of
# surrogate pairs, by which Python spells bytes of a file's name that are not UTF-8.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e"}


def printable(text: str) -> str:
    r"""The text on one line, with escapes such as `\e` and `\u202e` for what a terminal would act on or not show.

    Meant for eyes: a backslash stays one, so the text cannot be read back. Files and pipes get the text itself.
    """
    return _UNSAFE.sub(_escape, text)


def printable_json(text: str) -> str:
    """One or several lines of JSON, with JSON's own escapes for the same characters: it means what it meant."""
    return _UNSAFE.sub(_escape_json, text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines, such as a traceback, which keep their ends and their indentation."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        # PEP 383: the byte that it stands for.
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escape_json(match: re.Match[str]) -> str:
    # Its own whitespace stands outside of strings, where it ends a line.
    return match[0] if match[0] in "\n\t\r" else json.dumps(match[0])[1:-1]
