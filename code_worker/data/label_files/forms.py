"""Which form a label file has, told by its first bytes, and the reader for it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from code_worker.data.label_files.ground_truth import ground_truth_rows
from code_worker.data.label_files.label_studio import label_studio_rows
from code_worker.data.label_files.lines import UTF16
from code_worker.data.label_files.rows import Row, Words
from code_worker.data.label_files.tables import csv_rows, json_rows
from code_worker.data.reading import disguise
from code_worker.errors import ConfigurationError, DatasetError

__all__ = ["FORMS", "form_of", "read_rows"]

FORMS: Final[Mapping[str, Callable[[BinaryIO, Words, str], Iterator[Row]]]] = {
    "csv": csv_rows,
    "jsonl": json_rows,
    "label-studio": label_studio_rows,
    "ground-truth": ground_truth_rows,
}
_HEAD_BYTES: Final = 1 << 16


def read_rows(path: Path, words: Words, *, form: str | None = None, base: str | None = None) -> Iterator[Row]:
    """The rows of a label file, in its order, read as they are asked for.

    Args:
        path: the file.
        words: what its labels mean.
        form: one of `FORMS`; unset: told by content.
        base: where relative paths begin; unset: the file's directory.

    Raises:
        ConfigurationError: the file cannot be opened.
        DatasetError: it is empty, or as a whole not of its form.
    """
    try:
        with path.open("rb") as file:
            reader = FORMS[form or form_of(file)]
            file.seek(0)
            yield from reader(file, words, base or str(path.absolute().parent))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


def form_of(file: BinaryIO) -> str:
    """Form of a file by its first bytes: `[` begins an export, `{` lines of JSON, anything else a table.

    Raises:
        DatasetError: there is nothing in it, or it is an archive or a Git LFS pointer.
    """
    head = file.read(_HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
    if (instead := disguise(head)) is not None:
        raise DatasetError(instead)
    if head.startswith(UTF16):
        head = head.decode("utf-16", "replace").encode()
    head = head.lstrip()
    if not head:
        raise DatasetError("there is nothing in it")
    if head.startswith(b"["):
        return "label-studio"
    if head.startswith(b"{"):
        return "ground-truth" if b'"source-ref"' in head.partition(b"\n")[0] else "jsonl"
    return "csv"
