"""Import of label files: recognises the form, and turns rows into labels, each answered for by its place."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from code_worker.data.datasets.examples import disguise
from code_worker.data.label_files.label_rows import UTF16, Row, Words
from code_worker.data.label_files.labelling_tools import ground_truth_rows, label_studio_rows
from code_worker.data.label_files.tables import csv_rows, json_rows
from code_worker.data.labelling import Found, LabelFile, Labeller, Recorded, erased_meanwhile
from code_worker.errors import (
    CodeWorkerError,
    ConfigurationError,
    DatasetError,
    ImageRejectedError,
    SourceCredentialsError,
    StorageError,
    TransientError,
)
from code_worker.store.learning.labels import NewLabel
from code_worker.wire import chunks

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
        # Leniently: the head may end in the middle of a character.
        head = head.decode("utf-16", "replace").encode()
    head = head.lstrip()
    if not head:
        raise DatasetError("there is nothing in it")
    if head.startswith(b"["):
        return "label-studio"
    if head.startswith(b"{"):
        return "ground-truth" if b'"source-ref"' in head.partition(b"\n")[0] else "jsonl"
    return "csv"


_ROWS_PER_TRANSACTION: Final = 256
_UNKNOWN: Final = "0" * 64
_FATAL: Final = (StorageError, SourceCredentialsError)


@dataclass(frozen=True, slots=True)
class Imported:
    """Result of some rows.

    Attributes:
        rows: how many.
        new: how many said something new.
        refused: places of bad ones, with the reason.
        unsaid: how many name an image of which nobody has said anything.
    """

    rows: int
    new: int
    refused: list[tuple[str, str]]
    unsaid: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    """A row that can be stored once its image is known."""

    row: Row
    key: str
    label: NewLabel

    @property
    def target(self) -> tuple[str, str | None]:
        """Returns where the image is, or its hash; and the hash that it must have."""
        return self.row.uri or self.label.sha256, self.row.sha256


def import_rows(
    labeller: Labeller,
    rows: Iterable[Row],
    *,
    name: str,
    by: str,
    collection: str | None = None,
    threads: int,
    actor: str | None = None,
    sha256: str | None = None,
) -> Iterator[Imported]:
    """Records the rows in transactions of 256 and says after each what became of them.

    A row that was imported before is known by all that it says: nothing is fetched for it, even if its image is gone.

    Args:
        labeller: what finds and keeps the images.
        rows: as a reader gives them.
        name: the file's name, for the record.
        by: who labelled, where a row does not say.
        collection: where the images came from, where a row does not say.
        threads: images fetched at the same time.
        actor: who imports; unset: who labelled.
        sha256: of the file, for the audit, which has an entry for each transaction.

    Raises:
        NotAllowedError: the actor is no reviewer.
        StorageError, SourceCredentialsError: no row could go on; the good rows before it are recorded.
    """
    actor = by if actor is None else actor
    labeller.allow_import(actor)
    record = partial(_record, labeller, actor=actor, file=LabelFile(name, sha256))
    with ThreadPoolExecutor(threads, thread_name_prefix="label") as pool:
        # A transaction per chunk: begun again after a crash, the import knows rows of earlier ones by their keys.
        for some in chunks(rows, _ROWS_PER_TRANSACTION):
            group = [row for row in some if not row.unsaid]
            outcomes = [_draft(row, name, by, collection) for row in group]
            # By the key of all that a row says: two rows that say the same are one statement.
            drafts = {one.key: one for one in outcomes if isinstance(one, _Draft)}
            for key in labeller.imported(list(drafts)):
                del drafts[key]
            found = _find_all(labeller, pool, drafts.values())
            recorded = record(drafts.values(), found)
            faults = {key: fault for key, one in drafts.items() if not isinstance(fault := found[one.target], Found)}
            faults |= {
                key: erased_meanwhile(done.image.sha256)
                for key, one in drafts.items()
                if isinstance(done := found[one.target], Found) and done.image.sha256 in recorded.erased
            }
            if fatal := next((fault for fault in faults.values() if isinstance(fault, _FATAL)), None):
                raise fatal
            refused = list(_refused(group, outcomes, faults))
            yield Imported(len(some), recorded.added, refused, len(some) - len(group))


_Finds = Mapping[tuple[str, str | None], Found | CodeWorkerError]


def _refused(
    rows: Sequence[Row], outcomes: Sequence[_Draft | str], faults: Mapping[str, CodeWorkerError]
) -> Iterator[tuple[str, str]]:
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, str):
            yield row.place, outcome
        elif (fault := faults.get(outcome.key)) is not None:
            yield row.place, str(fault)


def _draft(row: Row, name: str, by: str, collection: str | None) -> _Draft | str:
    """The row as a statement, or why it cannot be one."""
    if row.problem:
        return row.problem
    try:
        label = NewLabel(
            sha256=row.sha256 or _UNKNOWN,
            label=row.label,
            by=row.by or by,
            source=f"file:{name}",
            generator=row.generator,
            collection=row.collection or collection,
            group=row.group,
            uri=row.uri,
            note=row.note or "",
            at=row.at,
            from_file=True,
        )
    except ValueError as error:
        return str(error)
    return _Draft(row, _key(row, label), label)


def _key(row: Row, label: NewLabel) -> str:
    """Of all that a row says; without a time the same words in another file are another statement."""
    when = label.source if label.at is None else label.at.timestamp()
    said = [row.uri, row.sha256, label.by, *label.content, when]
    if label.group is not None:
        said.append(label.group)  # a row without one keeps the key that it had before there were groups
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _find_all(labeller: Labeller, pool: ThreadPoolExecutor, drafts: Iterable[_Draft]) -> _Finds:
    """Each image once, however many rows are about it, or what is wrong with it."""

    def find(target: tuple[str, str | None]) -> Found | CodeWorkerError:
        try:
            return labeller.find(target[0], sha256=target[1])
        except (DatasetError, ImageRejectedError, TransientError) as error:
            return error

    targets = list(dict.fromkeys(draft.target for draft in drafts))
    return dict(zip(targets, pool.map(find, targets), strict=True))


def _record(labeller: Labeller, drafts: Iterable[_Draft], found: _Finds, *, actor: str, file: LabelFile) -> Recorded:
    new, rows = list[NewLabel](), dict[str, str]()
    for draft in drafts:
        if isinstance(one := found[draft.target], Found):
            new.append(replace(draft.label, sha256=one.image.sha256, uri=one.uri))
            rows[draft.key] = one.image.sha256
    return labeller.record(new, rows, actor=actor, file=file)
