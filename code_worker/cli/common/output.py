"""Output of commands: tables for people, JSON lines for programs, files that are whole or not there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from code_worker.errors import ConfigurationError
from code_worker.roles import current_user
from code_worker.system.files import whole_file
from code_worker.system.terminal import printable, printable_json

_SURROGATES = re.compile("[\ud800-\udfff]")
_WHOLE = frozenset({"id", "job", "created_at", "at"})


def console(*, stderr: bool = False) -> Console:
    """Console that wraps nothing when its output goes to a file or a pipe."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=200)


def plural(count: int, thing: str, things: str | None = None) -> str:
    """A number with what it counts: `1 job`, `2 jobs`, `1,024 jobs`."""
    return f"{count:,} {thing if count == 1 else things or f'{thing}s'}"


def say(*lines: str, err: bool = False) -> None:
    """Prints messages, one on each line; what came from outside cannot change the terminal or forge a line."""
    for line in lines:
        click.echo(printable(line), err=err)


def to_json(value: Any) -> str:
    """One line of JSON; times in ISO 8601."""
    text = json.dumps(value, default=_plain, ensure_ascii=False)
    # Of a file's name that is not UTF-8; alone they cannot be written.
    return _SURROGATES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def moment(value: datetime | None) -> str | None:
    """A time as tables show it, to the second, in UTC."""
    return None if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def print_json(value: Any) -> None:
    """One line of JSON on stdout; a terminal gets the same JSON with escapes for what it would act on."""
    click.echo(shown_json(to_json(value), sys.stdout))


def shown_json(text: str, stream: IO[str]) -> str:
    r"""JSON as it is for files and pipes, and with escapes such as `\u202e` for a terminal, to be read back alike."""
    return printable_json(text) if stream.isatty() else text


def print_json_lines(rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line on stdout."""
    for row in rows:
        print_json(row)


def print_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, empty: str) -> None:
    """A plain table of the named columns; `empty` is said when there is no row. Ids and times stay in one piece."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(printable(column.replace("_", " "))), overflow="fold", no_wrap=column in _WHOLE)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    if table.row_count:
        console().print(table)
    else:
        click.echo(empty)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values in two columns; what is None is left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(_cell(name), _cell(value))
    console().print(table)


def _cell(value: object) -> Text:
    if value is None:
        return Text("")
    return Text((moment(value) or "") if isinstance(value, datetime) else printable(str(value)))


@contextmanager
def output_stream(path: Path | None) -> Iterator[IO[str]]:
    """A text stream into `path`, or stdout for None; when the block fails, what was at `path` stays as it was.

    Raises:
        ConfigurationError: it cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    with ExitStack() as stack:
        try:
            # A device or a pipe is written to, not replaced.
            special = path.exists() and not path.is_file()
            target = path if special else stack.enter_context(whole_file(path, private=True))
            file = stack.enter_context(target.open("w", encoding="utf-8", newline=""))
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error
        yield file


def who() -> str:
    """The user that this process runs as."""
    return current_user()
