"""From lines of a list to accepted jobs: a bad line is reported by its number and spoils no other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code_worker.errors import (
    ConfigurationError,
    ImageRejectedError,
    SourceCredentialsError,
    StoreError,
    StoreUnavailableError,
)
from code_worker.queues import chunks

if TYPE_CHECKING:
    from code_worker.client import Client
    from code_worker.settings import Settings

__all__ = ["Accepted", "Done", "Line", "accept_lines", "listed_lines", "named_lines", "prefix_lines"]

_LINES_PER_TRANSACTION = 1024


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
    """What became of some lines: jobs, and the places of bad lines with what is wrong."""

    accepted: list[Accepted] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def named_lines(uris: Iterable[str]) -> Iterator[Line]:
    """The arguments of a command line."""
    return (Line(uri, {"uri": _absolute(uri)}) for uri in uris)


def prefix_lines(settings: Settings, prefix: str) -> Iterator[Line]:
    """Every object under a prefix.

    Raises:
        ConfigurationError: the prefix may not be listed, or does not exist.
    """
    from code_worker.images.source import Sources  # noqa: PLC0415 - boto3, only for who lists

    sources = Sources(settings)
    try:
        for uri in sources.list(prefix):
            yield Line(uri, {"uri": uri})
    except (ImageRejectedError, SourceCredentialsError) as error:
        raise ConfigurationError(f"cannot list {prefix}: {error}") from error
    finally:
        sources.close()


def listed_lines(stream: Iterable[str]) -> Iterator[Line]:
    """The lines of a file: URIs or JSON objects, in any mixture; empty lines are passed over."""
    number = 0
    try:
        for number, text in enumerate(stream, 1):
            if stripped := text.strip():
                yield _parse(f"line {number}", stripped)
    except UnicodeDecodeError as error:
        yield Line(f"after line {number}", problem=f"not UTF-8: {error.reason}; the rest was not read")


def _parse(place: str, text: str) -> Line:
    if not text.startswith("{"):
        return Line(place, {"uri": _absolute(text)})
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(place, problem=f"not JSON: {error}")
    uri = item.get("uri")
    return Line(place, {**item, "uri": _absolute(uri)} if isinstance(uri, str) and uri else item)


def _absolute(uri: str) -> str:
    """Workers run elsewhere: a path that is relative to this shell's directory means nothing there."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


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
        done.refused.append((line.place, str(error)))
