"""Manifests of SageMaker Ground Truth and Rekognition Custom Labels: image classification, one or several labels.

Those that people write for training have no metadata: an image and its class, `{"source-ref": …, "class": "1"}`.

Formats: https://docs.aws.amazon.com/sagemaker/latest/dg/sms-data-output.html (classification, multi-label) and
https://docs.aws.amazon.com/rekognition/latest/customlabels-dg/md-create-manifest-file-classification.html
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, BinaryIO, Final

from code_worker.data.label_files.lines import numbered_lines
from code_worker.data.label_files.rows import Row, RowError, Words, located, moment, text_of

__all__ = ["ground_truth_rows"]

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
    return [replace(_row(place, located(reference, base), job, words), group=group) for job in about]


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


def _row(place: str, uri: str, job: Mapping[str, Any], words: Words) -> Row:
    try:
        meaning = words.joint(_classes(job))
        return Row(
            place,
            uri=uri,
            label=meaning.label,
            generator=meaning.generator,
            by=_annotator(job),
            at=moment(text_of(job, "creation-date")),
        )
    except RowError as error:
        return Row(place, problem=str(error))


def _annotator(job: Mapping[str, Any]) -> str | None:
    """The labelling job; what active learning answered in its place is another labeller's word."""
    name = text_of(job, "job-name")
    return f"{name} (automatic)" if name and job.get("human-annotated") == "no" else name
