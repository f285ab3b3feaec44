"""Label Studio's JSON export: tasks with annotations, one statement for each annotator's choice.

Format: https://labelstud.io/guide/task_format
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final
from urllib.parse import parse_qs, unquote, urlsplit

from code_worker.data.label_files.rows import Row, RowError, Words, located, moment, text_of
from code_worker.errors import DatasetError

__all__ = ["label_studio_rows"]

_IMAGE: Final = ("image", "img", "uri", "url", "path")
_STORAGE: Final = re.compile(r"/(tasks|projects)/\d+/(presign|resolve)/")


def label_studio_rows(file: BinaryIO, words: Words, base: str) -> Iterator[Row]:
    """Rows of an export, read whole; predictions, cancelled annotations and tasks without one are passed over.

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
    for annotation in annotations:
        if not isinstance(annotation, dict):
            yield Row(place, problem="an annotation is no object")
        elif not annotation.get("was_cancelled"):
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
    return f"label-studio:{who}" if isinstance(who, int | str) and who != "" else None


def _address(data: Mapping[str, Any]) -> str:
    texts = [name for name, value in data.items() if isinstance(value, str) and name != "group"]
    name = next((name for name in _IMAGE if name in texts), texts[0] if len(texts) == 1 else None)
    if name is None:
        raise RowError(f"none of its data is called {', '.join(_IMAGE)}: {', '.join(map(str, data))[:200]}")
    return _plain_address(data[name])


def _plain_address(address: str) -> str:
    """What stands behind the paths under which Label Studio serves images itself."""
    parts = urlsplit(address) if address.startswith("/") else None
    if parts is None:
        return address
    query = parse_qs(parts.query)
    if parts.path == "/data/local-files/" and "d" in query:
        return query["d"][0]
    if parts.path.startswith("/data/"):
        return unquote(parts.path.removeprefix("/data/"))
    if _STORAGE.fullmatch(parts.path) and "fileuri" in query:
        try:
            return base64.b64decode(query["fileuri"][0], altchars=b"-_").decode()
        except ValueError:
            raise RowError(f"{address[:200]} cannot be read") from None
    return address
