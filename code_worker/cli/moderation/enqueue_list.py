"""From lines of a list to accepted jobs: a bad line is reported by its number and spoils no other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from code_worker.cli.common.image_inputs import Inputs, local_name
from code_worker.errors import (
    ConfigurationError,
    ImageRejectedError,
    SourceCredentialsError,
    StoreError,
    StoreUnavailableError,
)
from code_worker.images.source import source_name
from code_worker.wire import JobItem, chunks

if TYPE_CHECKING:
    from code_worker.client import Client
    from code_worker.images.listing import LeftOut
    from code_worker.settings import Settings

_LINES_PER_TRANSACTION = 1024
_BLOCK = 1 << 16
_BOM = "\ufeff"
_UTF16 = ("\udcff\udcfe", "\udcfe\udcff")
# How JPEG, PNG, GIF, TIFF, zip and gzip begin, with bytes that are not UTF-8 as surrogates. A list of names that
# end in NUL may hold any character, so that nothing later in the file tells the one from the other.
_BINARY = ("\udcff\udcd8\udcff", "\udc89PNG", "GIF87a", "GIF89a", "II*\0", "MM\0*", "PK\x03\x04", "\x1f\udc8b")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAK = re.compile("\r\n|\r|\n")
_ARRAY = re.compile(r'\s*\[\s*["{\]]')
_ADDRESSES = frozenset({"uri", "url", "path", "image", "file", "filename"})
_COLUMNS = _ADDRESSES | JobItem.model_fields.keys()
_NO_AUTHORITY = re.compile(r"(?P<scheme>file|s3|https?):(?P<slash>/?)(?!/)")


@dataclass(frozen=True, slots=True)
class Line:
    """One entry of a list: where it stands, and its job's fields or what is wrong with it."""

    place: str
    item: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that is in the ledger."""

    job_id: str
    uri: str


@dataclass(slots=True)
class Done:
    """Result of some lines: jobs, and the places of bad lines with what is wrong."""

    accepted: list[Accepted] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def named_lines(settings: Settings, uris: Iterable[str], left_out: LeftOut) -> Generator[Line]:
    """The arguments of a command line; of a directory every image in it, as `scan` finds them.

    Args:
        settings: where images may be read.
        uris: addresses, files and directories.
        left_out: takes what of the directories is not enqueued.

    Raises:
        ConfigurationError: a directory that cannot be listed.
    """
    for uri in uris:
        local = local_name(uri)
        if local and os.path.isdir(local):
            yield from _in_directory(settings, uri, left_out)
        else:
            yield _line(uri or '""', uri)


def _in_directory(settings: Settings, directory: str, left_out: LeftOut) -> Iterator[Line]:
    from code_worker.images.source import Sources

    inputs = Inputs((directory,), every_file=False, left_out=left_out)
    with closing(Sources(inputs.allow(settings))) as sources:
        yield from (_line(uri, uri) for uri in inputs.uris(sources))


def _line(place: str, uri: str) -> Line:
    try:
        return Line(place, {"uri": _absolute(uri)})
    except ValueError as error:
        return Line(place, problem=str(error))


def prefix_lines(settings: Settings, prefix: str) -> Generator[Line]:
    """Every object under a prefix, every file under a directory.

    Raises:
        ConfigurationError: the prefix may not be listed, or does not exist.
    """
    from code_worker.images.source import Sources

    sources = Sources(settings)
    try:
        for uri in sources.list(_absolute(prefix)):
            yield Line(uri, {"uri": uri})
    except (ImageRejectedError, SourceCredentialsError, ValueError) as error:
        raise ConfigurationError(f"cannot list {prefix}: {error}") from error
    finally:
        sources.close()


def listed_lines(source: IO[bytes]) -> Generator[Line]:
    """The entries of a list: URIs or JSON objects, one per line, in any mixture; or a JSON array of them.

    Empty lines and those that begin with # are passed over. Where a NUL ends each entry (`find -print0`), they are
    names as they stand. A list without any entry is a line with that problem.

    Args:
        source: in UTF-8, but for names of files, which may hold any bytes.
    """
    # Read as it is: a name that ends in NUL may hold any line break.
    stream = TextIOWrapper(source, encoding="utf-8", errors="surrogateescape", newline="")
    empty = True
    try:
        for line in _listed(stream):
            empty = False
            yield line
        if empty:
            yield Line("the list", problem="it names no image")
    finally:
        stream.detach()  # else it would close what it did not open


def _listed(stream: TextIOWrapper) -> Iterator[Line]:
    first = stream.read(_BLOCK).removeprefix(_BOM)
    if first.endswith("\r"):
        first += stream.read(1)
    if first.startswith(_BINARY):
        yield Line("the list", problem="it is an image or an archive, and no list: name it without --from")
    elif first.startswith(_UTF16):
        yield Line("the list", problem="it is UTF-16: save it as UTF-8")
    elif "\0" in first:
        names = enumerate(_until_nul(first, stream), 1)
        yield from (_listed_line(f"entry {number}", name) for number, name in names)
    elif first.lstrip().startswith("["):
        yield from _array(first + stream.read())
    else:
        yield from _lines(_joined(first, stream))


def _array(text: str) -> Iterator[Line]:
    """The entries of a JSON array, or of a list whose first name begins as one."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _ARRAY.match(text):
            yield Line("the list", problem=f"not JSON: {error}")
        else:
            yield from _lines(_LINE_BREAK.split(text))
    else:
        yield from (_parse(f"entry {number}", entry) for number, entry in enumerate(entries, 1))


def _lines(lines: Iterable[str]) -> Iterator[Line]:
    first = True
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix(_BOM)
        if not text or text.startswith("#"):
            continue
        if first and _is_csv_header(text):
            yield Line(f"line {number}", problem="this looks like a CSV: write one URI per line, or JSON lines")
            return  # its rows would be taken for names
        first = False
        yield _parse(f"line {number}", text)


def _is_csv_header(text: str) -> bool:
    """Returns whether a line holds names of fields, and one of them that of an address."""
    names = {name.strip().strip('"').lower() for name in re.split("[,;\t]", text)}
    return names <= _COLUMNS and bool(names & _ADDRESSES) and not os.path.exists(text)


def _joined(first: str, stream: TextIOWrapper) -> Iterator[str]:
    """Lines, of which the first block may end within one."""
    *whole, last = _LINE_BREAK.split(first)
    yield from whole
    yield last + stream.readline()
    yield from stream


def _until_nul(first: str, stream: TextIOWrapper) -> Iterator[str]:
    rest = first
    while True:
        *whole, rest = rest.split("\0")
        yield from whole
        if not (block := stream.read(_BLOCK)):
            break
        rest += block
    if rest:
        yield rest


def _parse(place: str, entry: Any) -> Line:
    if isinstance(entry, str) and entry.startswith(("{", '"')):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError) as error:
            return Line(place, problem=f"not JSON: {error}")
    if isinstance(entry, str):
        return _listed_line(place, entry)
    if not isinstance(entry, dict):
        return Line(place, problem="a job is a URI or an object of its fields")
    uri = entry.get("uri")
    if not isinstance(uri, str) or not uri:
        return Line(place, entry)
    made = _listed_line(place, uri)
    return made if made.problem else Line(place, {**entry, **made.item})


def _listed_line(place: str, uri: str) -> Line:
    """An entry of a list, which names images one by one."""
    made = _line(place, uri)
    local = None if made.problem else local_name(made.item["uri"])
    if local and os.path.isdir(local):
        return Line(place, problem="a directory: name it as an argument, or list its files")
    return made


def unread_schemes(accepted: Iterable[Accepted]) -> set[str]:
    """Schemes of addresses that no source reads, so that workers reject their images."""
    names = (source_name(one.uri) for one in accepted)
    return {name for name in names if name != "file" and not name.startswith("s3://")}


def _absolute(uri: str) -> str:
    """The address as workers find it: they run elsewhere, where this shell's directory means nothing.

    Raises:
        ValueError: it names nothing.
    """
    if not uri.strip():
        raise ValueError("an empty address names no image")
    if "://" in uri:
        if _SURROGATE.search(uri):
            raise ValueError("the address is not UTF-8")
        return uri
    if match := _NO_AUTHORITY.match(uri):
        # RFC 8089 knows file:/path too.
        if match["scheme"] == "file" and match["slash"]:
            return f"file://{uri[5:]}"
        if not os.path.exists(uri):
            raise ValueError(f"{uri} is no address: write {match['scheme']}://…, or ./{uri} for a file of this name")
    try:
        path = Path(uri).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{uri}: {error} write ./{uri} for a file of this name") from None
    # A name that is no text can be told as a URI.
    return path.as_uri() if _SURROGATE.search(str(path)) else str(path)


def accept_lines(client: Client, lines: Iterable[Line], common: Mapping[str, Any]) -> Iterator[Done]:
    """Writes jobs in transactions of 1024; `common` fields hold where a line says nothing else."""
    for group in chunks(lines, _LINES_PER_TRANSACTION):
        done = Done(refused=[(line.place, line.problem) for line in group if line.problem])
        good = [line for line in group if not line.problem]
        try:
            _accept(client, good, common, done)
        except StoreUnavailableError:
            raise
        except (ValueError, StoreError):
            # One of them is bad: one by one, so that the others are accepted and it is named.
            for line in good:
                _accept_one(client, line, common, done)
        yield done


def _accept(client: Client, lines: Sequence[Line], common: Mapping[str, Any], done: Done) -> None:
    items = [{**common, **line.item} for line in lines]
    ids = client.enqueue_many(items)
    done.accepted += [Accepted(job_id, item["uri"]) for job_id, item in zip(ids, items, strict=True)]


def _accept_one(client: Client, line: Line, common: Mapping[str, Any], done: Done) -> None:
    try:
        _accept(client, [line], common, done)
    except StoreUnavailableError:
        raise
    except (ValueError, StoreError) as error:
        # The client's place of an item is 0: it was given this one alone.
        done.refused.append((line.place, str(error).removeprefix("item 0: ")))
