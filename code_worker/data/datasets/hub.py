"""Data sets of the hub: D³'s records of four generated images and a URL, or rows of `image` and `label`."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from code_worker.data.datasets.examples import (
    FAKE,
    REAL,
    Example,
    Held,
    Skipped,
    disguise,
    generator_slug,
    label_of,
    numbered_generator,
)
from code_worker.errors import ConfigurationError, DatasetError
from code_worker.system.libraries import silent_import
from code_worker.system.terminal import printable

if TYPE_CHECKING:
    from code_worker.data.datasets.urls import UrlSource

HUB_PREFIX: Final = "hf:"
_NAME: Final = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?")
_IMAGE_COLUMN: Final = re.compile(r"image_gen_?(\d{1,4})")


class RealUrls:
    """A budget of real images that may still be fetched by their URL, and what fetches them."""

    def __init__(self, source: UrlSource, most: int) -> None:
        self._source = source
        self._left = most

    def take(self, url: str) -> partial[bytes] | None:
        """Returns what reads the image, unless the number allowed is used up."""
        if self._left <= 0:
            return None
        # Counted when it is handed out, not when it is fetched: how many are asked for is certain before any is.
        self._left -= 1
        return partial(self._source.fetch, url)


def hub_examples(
    source: str, *, max_bytes: int, skipped: list[Skipped], real_urls: RealUrls | None = None
) -> Iterator[Example]:
    """Images of `hf:owner/name[@revision][:split]`, streamed: nothing is stored, and nothing decoded.

    Args:
        source: The name; the split is `train` unless it says otherwise.
        max_bytes: Larger images are skipped.
        skipped: Takes images that are missing or too large.
        real_urls: Fetches real images; None: there are none, the hub has only their URLs.

    Raises:
        ConfigurationError: a malformed name, or the `datasets` library is not installed.
        DatasetError: no such data set or split, another form, or the hub cannot be reached.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise ConfigurationError(f"{source!r} is no data set of the hub; write hf:owner/name[@revision][:split]")
    arguments = {"path": match["repo"], "revision": match["revision"], "split": match["split"] or "train"}
    rows = _rows(source, arguments)
    return _examples(rows, source, match["repo"], max_bytes=max_bytes, skipped=skipped, real_urls=real_urls)


def parquet_examples(
    paths: Sequence[Path], *, max_bytes: int, skipped: list[Skipped], real_urls: RealUrls | None = None
) -> Iterator[Example]:
    """Like `hub_examples`, of parquet files that were downloaded; a damaged one is read up to the damage.

    Raises:
        ConfigurationError: the `datasets` library is not installed.
        DatasetError: no temporary directory can be made.
    """
    # The library makes its cache's directory even where it keeps nothing, and a home may be read-only.
    with _temporary_directory() as cache:
        for path in paths:
            name = printable(str(path))
            if (instead := _disguised(path)) is not None:
                skipped.append(Skipped(name, instead))
                continue
            rows = _rows(name, {"path": "parquet", "data_files": [str(path)], "split": "train", "cache_dir": cache})
            try:
                collection = path.absolute().parent.name
                yield from _examples(
                    rows, name, collection, max_bytes=max_bytes, skipped=skipped, real_urls=real_urls
                )
            except DatasetError as error:
                skipped.append(Skipped(name, str(error)))


def _disguised(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return disguise(file.read(64))
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="code-worker-parquet-")
    except OSError as error:
        raise DatasetError(f"no temporary directory: {error}") from error


def _rows(what: str, arguments: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    try:
        with silent_import():
            import datasets  # an extra, and seconds to import
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{what} is read with datasets: pip install 'code-worker[data]'") from error
    from huggingface_hub import errors  # comes with datasets

    # If the process had imported it before, it would tell a counter on the internet of each file, those here as well.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # What it logs of a damaged file it raises as well, and it has a handler of its own.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)

    # The hub's client changed its HTTP library more than once; this is the base class of whichever it uses.
    http_error: type[Exception] = getattr(errors, "HTTPError", OSError)
    try:
        found = datasets.load_dataset(**arguments, streaming=True)
        classes = getattr((found.features or {}).get("label"), "names", None)
        # Undecoded: Pillow's decoding would change the bytes that hashes and verdicts are about.
        for row in found.decode(False):
            yield _named(row, classes) if classes else row
    # RuntimeError: a data set that is a program, which is not run. The others: parquet's, and what the network says.
    except (OSError, ValueError, RuntimeError, NotImplementedError, http_error) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise DatasetError(
            f"cannot read {what}: {first}. Without network, download its parquet files elsewhere and name these"
            if what.startswith(HUB_PREFIX)
            else f"cannot be read: {first}"
        ) from error


def _named(row: Mapping[str, Any], classes: Sequence[str]) -> Mapping[str, Any]:
    """The row with the name of its class for its number: which of two is 0, each data set says for itself."""
    number = row["label"]
    return {**row, "label": classes[number] if isinstance(number, int) and 0 <= number < len(classes) else None}


def _examples(
    rows: Iterator[Mapping[str, Any]],
    name: str,
    collection: str,
    *,
    max_bytes: int,
    skipped: list[Skipped],
    real_urls: RealUrls | None,
) -> Iterator[Example]:
    first = next(rows, None)
    if first is None:
        return
    every = itertools.chain([first], rows)
    columns = sorted((int(match[1]), column) for column in first if (match := _IMAGE_COLUMN.fullmatch(column)))
    if not columns and first.keys() >= {"image", "label"}:
        yield from _plain_examples(every, name, collection, max_bytes=max_bytes, skipped=skipped)
        return
    if not columns:
        raise DatasetError(
            f"{name} is not of a form that is read: columns id, image_gen0 …, model_gen0 …, url, or image and label; "
            f"it has {printable(', '.join(map(str, first)))}"
        )
    for index, row in enumerate(every):
        identity = _identity(row, index)
        key, group = f"{name}#{identity}", f"{collection}#{identity}"
        for number, column in columns:
            found = _image(row[column], max_bytes)
            if isinstance(found, str):
                skipped.append(Skipped(f"{key}.gen_{number}", found))
                continue
            made = generator_slug(str(row.get(f"model_gen{number}") or "")) or numbered_generator(number)
            yield Example(f"{key}.gen_{number}", FAKE, found, made, collection, group=group)
        if real_urls is not None and isinstance(url := row.get("url"), str) and (read := real_urls.take(url)):
            yield Example(f"{key}.real", REAL, read, collection=collection, group=group)


def _plain_examples(
    rows: Iterator[Mapping[str, Any]], name: str, collection: str, *, max_bytes: int, skipped: list[Skipped]
) -> Iterator[Example]:
    """Rows of one image and its label: the name of a class, else real or 0, fake or 1."""
    for index, row in enumerate(rows):
        key = f"{name}#{_identity(row, index)}"
        found = _image(row["image"], max_bytes)
        if isinstance(found, str):
            skipped.append(Skipped(key, found))
            continue
        try:
            label = label_of(row["label"])
        except ValueError as error:
            skipped.append(Skipped(key, printable(str(error))))
            continue
        generator = row.get("generator")
        made_by = generator if label == FAKE and isinstance(generator, str) and generator else None
        yield Example(key, label, found, made_by, collection)


def _identity(row: Mapping[str, Any], index: int) -> str:
    return printable(str(index if row.get("id") is None else row["id"]))


def _image(value: object, max_bytes: int) -> Held | str:
    """Returns what reads the image of a column, or why there is none.

    A path in it names a place on somebody else's disk.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        return "its bytes are not in the data set"
    return Held(data) if len(data) <= max_bytes else f"over {max_bytes} bytes"
