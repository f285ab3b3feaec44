"""Exports of labelling tools: Label Studio's, and manifests of SageMaker Ground Truth and Rekognition."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, BinaryIO, Final
from urllib.parse import parse_qs, unquote, urlsplit

from code_worker.data.label_files.label_rows import (
    Row,
    RowError,
    Words,
    located,
    moment,
    numbered_lines,
    row_of,
    text_of,
)
from code_worker.errors import DatasetError

STUDIO_COLUMNS: Final = frozenset({"annotation_id", "annotator"})
"""What tells a row of JSON-MIN or CSV, beside data and answers under names of the project's own."""
_ABOUT: Final = STUDIO_COLUMNS | {"id", "created_at", "updated_at", "lead_time", "agreement", "group"}

_IMAGE: Final = ("image", "img", "uri", "url", "path")
_STORAGE: Final = re.compile(r"(?:/.*)?/(tasks|projects)/\d+/(presign|resolve)/")
_LOCAL: Final = re.compile(r"(?:/.*)?/data/local-files/")
_UPLOADED: Final = re.compile(r"(?:/.*)?/data/(upload/.*)")
_SERVED: Final = re.compile(r"/data/(.*)")


def label_studio_rows(file: BinaryIO, words: Words, base: str) -> Iterator[Row]:
    """Rows of an export, read whole; predictions and cancelled annotations are passed over.

    A task without any other is a row in which nothing is said.

    Raises:
        DatasetError: the file is not JSON, or no list of tasks.
    """
    try:
        tasks = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"it is not JSON: {error}") from None
    if not isinstance(tasks, list):
        raise DatasetError("it is no list of tasks; export from Label Studio as JSON")
    for number, task in enumerate(tasks, 1):
        if isinstance(task, dict) and task.keys() >= STUDIO_COLUMNS:
            yield studio_row(f"task {task.get('id', '?')}, annotation {task['annotation_id']}", task, words, base)
        elif isinstance(task, dict) and "label" in task and "data" not in task:
            # Not Label Studio's: the objects of JSON lines, in an array.
            yield row_of(f"entry {number}", task, words, base)
        else:
            yield from _task_rows(number, task, words, base)


def _task_rows(number: int, task: Any, words: Words, base: str) -> Iterator[Row]:
    place = f"task {task['id']}" if isinstance(task, dict) and "id" in task else f"entry {number}"
    if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
        yield Row(place, problem="it is no task with data and annotations; export from Label Studio as JSON")
        return
    annotations = task.get("annotations", [])
    if not isinstance(annotations, list):
        yield Row(place, problem="its annotations are no list")
        return
    said = [one for one in annotations if not (isinstance(one, dict) and one.get("was_cancelled"))]
    if not said:
        yield Row(place, unsaid=True)
    for annotation in said:
        if not isinstance(annotation, dict):
            yield Row(place, problem="an annotation is no object")
        else:
            yield _row(f"{place}, annotation {annotation.get('id', '?')}", task["data"], annotation, words, base)


def _row(place: str, data: Mapping[str, Any], annotation: Mapping[str, Any], words: Words, base: str) -> Row:
    try:
        meaning = words.joint(_choices(annotation))
        return Row(
            place,
            uri=located(_address(data), base),
            label=meaning.label,
            generator=meaning.generator,
            group=text_of(data, "group"),
            by=_annotator(annotation.get("completed_by")),
            at=moment(text_of(annotation, "updated_at") or text_of(annotation, "created_at")),
        )
    except RowError as error:
        return Row(place, problem=str(error))


def studio_row(place: str, fields: Mapping[str, Any], words: Words, base: str) -> Row:
    """A row of JSON-MIN or CSV: an annotation beside its task's data; what people answered stands under any name."""
    try:
        image = _image_field({name: value for name, value in fields.items() if name not in _ABOUT}, words)
        answers = [value for name, value in fields.items() if name not in {image, *_ABOUT}]
        meaning = words.joint(word for value in answers for word in _answered(value))
        return Row(
            place,
            uri=located(_plain_address(str(fields[image])), base),
            label=meaning.label,
            generator=meaning.generator,
            group=text_of(fields, "group"),
            by=_annotator(fields["annotator"]),
            at=moment(text_of(fields, "updated_at") or text_of(fields, "created_at")),
        )
    except RowError as error:
        return Row(place, problem=str(error))


def _answered(value: object) -> Iterator[object]:
    """Words of an answer: one, several as `{"choices": […]}`, a list of such, or any of it as JSON in CSV."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    if isinstance(value, dict):
        value = value.get("choices")
    if isinstance(value, list):
        for one in value:
            yield from _answered(one) if isinstance(one, dict) else [one]
    elif value not in {None, ""}:
        yield value


def _choices(annotation: Mapping[str, Any]) -> Iterator[object]:
    results = annotation.get("result")
    for result in results if isinstance(results, list) else ():
        value = result.get("value") if isinstance(result, dict) else None
        choices = value.get("choices") if isinstance(value, dict) else None
        yield from choices if isinstance(choices, list) else ()


def _annotator(who: object) -> str | None:
    """The address of a person where the export has it, else their number, which only their server knows."""
    if isinstance(who, dict):
        return text_of(who, "email") or _annotator(who.get("id"))
    if isinstance(who, str) and "@" in who:
        return who
    return f"label-studio:{who}" if isinstance(who, int | str) and who != "" else None


def _address(data: Mapping[str, Any]) -> str:
    return _plain_address(data[_image_field({name: value for name, value in data.items() if name != "group"})])


def _image_field(data: Mapping[str, Any], words: Words | None = None) -> str:
    """Name of the field with the image's address; where answers stand beside it, none of their words is one."""
    texts = [name for name, value in data.items() if isinstance(value, str) and not (words and words.known(value))]
    name = next((name for name in _IMAGE if name in texts), texts[0] if len(texts) == 1 else None)
    if name is None:
        raise RowError(f"none of its data is called {', '.join(_IMAGE)}: {', '.join(map(str, data))[:200]}")
    return name


def _plain_address(address: str) -> str:
    """Returns what stands behind the paths under which Label Studio serves images itself, on any host."""
    try:
        parts = urlsplit(address)
    except ValueError:  # brackets that do not match
        return address
    if not address.startswith("/") and parts.scheme not in {"http", "https"}:
        return address
    query = parse_qs(parts.query)
    if _LOCAL.fullmatch(parts.path) and "d" in query:
        return query["d"][0]
    # Without a host all of /data/ is Label Studio's.
    if served := (_UPLOADED if parts.netloc else _SERVED).fullmatch(parts.path):
        return unquote(served[1])
    if _STORAGE.fullmatch(parts.path) and "fileuri" in query:
        try:
            return base64.b64decode(query["fileuri"][0], altchars=b"-_").decode()
        except ValueError:
            raise RowError(f"{address[:200]} cannot be read") from None
    return address


_SUFFIX: Final = "-metadata"
_TYPES: Final = frozenset({"groundtruth/image-classification", "groundtruth/image-classification-multilabel"})


def ground_truth_rows(file: BinaryIO, words: Words, base: str) -> Iterator[Row]:
    """Rows of a manifest: one for each labelling job in a line whose classes are known words."""
    for line in numbered_lines(file):
        if line.problem:
            yield Row(line.place, problem=line.problem)
        elif line.text.strip():
            try:
                yield from _rows(line.place, _entry(line.text), words, base)
            except RowError as error:
                yield Row(line.place, problem=str(error))


def _entry(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"it is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise RowError("it is no JSON object")
    return entry


def _rows(place: str, entry: Mapping[str, Any], words: Words, base: str) -> list[Row]:
    if (reference := text_of(entry, "source-ref")) is None:
        raise RowError("it has no source-ref")
    if entry.keys() - {"source-ref", "group"} and not any(name.endswith(_SUFFIX) for name in entry):
        return [_plain_row(place, located(reference, base), entry, words)]
    jobs = list(_jobs(entry))
    if not jobs:
        raise RowError("no image classification is in it")
    # Jobs may be chained, each with a question of its own.
    about = [job for job in jobs if any(map(words.known, _classes(job)))] or jobs
    # A field of this name that a labelling job made is its answer.
    group = None if f"group{_SUFFIX}" in entry else text_of(entry, "group")
    return [replace(_manifest_row(place, located(reference, base), job, words), group=group) for job in about]


def _plain_row(place: str, uri: str, entry: Mapping[str, Any], words: Words) -> Row:
    """A row of a manifest without metadata, whose class is called `label`, or as its only other field is."""
    others = [name for name in entry if name not in {"source-ref", "group"}]
    name = "label" if "label" in others else others[0] if len(others) == 1 else None
    if name is None:
        raise RowError(f"none of its fields is called label: {', '.join(others)[:200]}")
    meaning = words.meaning(text_of(entry, name))
    return Row(place, uri=uri, label=meaning.label, generator=meaning.generator, group=text_of(entry, "group"))


def _jobs(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name, metadata in entry.items():
        if not name.endswith(_SUFFIX) or not isinstance(metadata, dict):
            continue
        if reason := metadata.get("failure-reason"):
            raise RowError(f"{name.removesuffix(_SUFFIX)} failed: {str(reason)[:200]}")
        if metadata.get("type") in _TYPES:
            yield metadata


def _classes(job: Mapping[str, Any]) -> list[object]:
    several = job.get("class-map")
    return list(several.values()) if isinstance(several, dict) else [job.get("class-name")]


def _manifest_row(place: str, uri: str, job: Mapping[str, Any], words: Words) -> Row:
    try:
        meaning = words.joint(_classes(job))
        return Row(
            place,
            uri=uri,
            label=meaning.label,
            generator=meaning.generator,
            by=_manifest_annotator(job),
            at=moment(text_of(job, "creation-date")),
        )
    except RowError as error:
        return Row(place, problem=str(error))


def _manifest_annotator(job: Mapping[str, Any]) -> str | None:
    """The labelling job; what active learning answered in its place is another labeller's word."""
    name = text_of(job, "job-name")
    return f"{name} (automatic)" if name and job.get("human-annotated") == "no" else name
