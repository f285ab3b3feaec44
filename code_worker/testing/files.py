"""Checks of what a head writes and reads."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import IO, Final

from code_worker.errors import ArtifactError
from code_worker.heads import Head
from code_worker.testing.subject import NotConformingError, Subject, largest_difference

__all__ = ["FILE_CHECKS", "load_again"]

_PICKLE_SUFFIXES: Final = frozenset({".pkl", ".pickle", ".joblib", ".sav", ".pt", ".pth"})
_PICKLE_STARTS: Final = tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))


def check_save_and_load(subject: Subject) -> None:
    """What `load` gives scores bit by bit as the head that was saved."""
    directory = subject.saved("reload")
    if not any(path.is_file() for path in directory.rglob("*")):
        raise NotConformingError("save writes files", "an empty directory", "write the fitted state in save")
    loaded = load_again(subject, directory, subject.head)
    before, after = subject.head.score(subject.embeddings), loaded.score(subject.embeddings)
    if before.tobytes() != after.tobytes():
        raise NotConformingError(
            "bit-identical scores after save and load",
            f"a difference of {largest_difference(before, after):.2g}",
            "save every array in the dtype that score computes with; do not round",
        )


def load_again(subject: Subject, directory: Path, head: Head) -> Head:
    """What the class loads from a directory that `head` was saved into, with its options."""
    if isinstance(inspect.getattr_static(subject.head_class, "load"), FunctionType):
        raise NotConformingError(
            "load is a classmethod", "a method of a head that there is not yet", "write @classmethod above load"
        )
    loaded: object = subject.head_class.load(directory, head.options.model_dump(mode="json"))
    if not isinstance(loaded, subject.head_class):
        raise NotConformingError("load returns a head", type(loaded).__name__, "end load with `return head`")
    return loaded


def check_missing_files(subject: Subject) -> None:
    """`load` raises ArtifactError when the files are not there."""
    empty = subject.directory / "empty"
    empty.mkdir()
    try:
        subject.head_class.load(empty)
    except ArtifactError:
        return
    except Exception as error:  # noqa: BLE001 - whatever else it raises is what this check is about
        seen = type(error).__name__
    else:
        seen = "a head out of nothing"
    raise NotConformingError(
        "ArtifactError from load of an empty directory",
        seen,
        "raise code_worker.errors.ArtifactError from the OSError",
    )


def check_no_pickles(subject: Subject) -> None:
    """Saved files need no unpickling: a pickle runs whatever it contains."""
    for path in sorted(subject.saved("scan").rglob("*")):
        for reason in _pickle_signs(path):
            raise NotConformingError(
                "files in plain forms (safetensors, npz without objects, JSON)",
                f"{path.name}: {reason}",
                "save arrays and numbers, and rebuild the head from them in load",
            )


def _pickle_signs(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        yield from _signs_of_content(path.name, file)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    for sign in _signs_of_content(member, file):
                        yield f"{sign} inside: {member}"


def _signs_of_content(name: str, file: IO[bytes]) -> Iterator[str]:
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        yield f"a name that ends in {suffix}"
    start = file.read(2)
    if start in _PICKLE_STARTS:
        yield "content that begins as a pickle"
    if suffix == ".npy" and b"'|O'" in file.read(256):
        yield "an array of Python objects"


FILE_CHECKS: Final = (check_save_and_load, check_missing_files, check_no_pickles)
