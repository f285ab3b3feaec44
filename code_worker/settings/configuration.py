"""Reads settings where they are written: in the environment, in a TOML file, in the mapping of a program.

All three read text alike: an empty one sets nothing, `null` empties an optional setting, `a,b` is a list. A name that
is no setting is refused with the nearest one that is. No error shows a value: it may be a secret.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Final, TypeGuard, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from code_worker.errors import ConfigurationError, nearest

CONFIG_ENV: Final = "CODE_WORKER_CONFIG"
PREFIX: Final = "CODE_WORKER_"
_PROGRAM: Final = "app.conf.code_worker"
_OTHERS: Final = frozenset(
    {CONFIG_ENV, "CODE_WORKER_FAILPOINT", "CODE_WORKER_OWNER", "CODE_WORKER_SUPERVISOR_PID"},
)
"""Our own variables that are no settings: for tests, and what a supervisor tells its children."""

_SERVICE_LINK: Final = re.compile(
    r"CODE_WORKER(?:_[A-Z0-9_]+)?_(?:"
    r"SERVICE_HOST=[0-9A-Fa-f.:]+(?:%\S+)?|SERVICE_PORT(?:_[A-Z0-9_]+)?=\d+"
    r"|PORT(?:_\d+_(?:TCP|UDP|SCTP))?(?:_START|_END)?=(?:tcp|udp|sctp)://[0-9A-Fa-f.:\[\]]+:\d+"
    r"|PORT_\d+_(?:TCP|UDP|SCTP)_(?:PROTO=(?:tcp|udp|sctp)|PORT(?:_START|_END)?=\d+|ADDR=[0-9A-Fa-f.:]+(?:%\S+)?)"
    r"|NAME=/[^/\s]+/[^/\s]+|ENV_[A-Za-z0-9_]+=.*)",
    re.DOTALL,
)
"""What Kubernetes sets for a service, and Docker for a link, whose name begins with `code-worker`: address, protocol
and port; Docker also the link's name and a copy of the other container's environment."""

_TABLE_LINE: Final = re.compile(r"\s*\[\[?([^\[\]]+)\]")
_KEY_LINE: Final = re.compile(r"\s*([\w\-.\"' ]+?)\s*=")
_UNSET: Final = object()
_QUOTED: Final = "write text, in quotes"
_TEXT_WANTED: Final = {"path_type": _QUOTED, "string_type": _QUOTED}
_LIST_WANTED: Final = {
    "path_type": "an entry of the list is no text",
    "string_type": "an entry of the list is no text",
    "tuple_type": 'write a list, such as ["a", "b"]',
}
"""By pydantic's name of the error, what a setting takes that is text or a list of texts."""

_Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """The settings of one place: `values` nested as the sections are, `place` names where a setting stands there."""

    values: dict[str, Any]
    place: Callable[[_Names], str]

    def holds(self, names: Sequence[object]) -> bool:
        """Returns whether this layer sets that setting, or a part of it."""
        found: Any = self.values
        for name in names:
            if not isinstance(found, Mapping):
                return True
            if name not in found:
                return False
            found = found[name]
        return True


def layers(model: type[BaseModel], below: Mapping[str, object]) -> list[Layer]:
    """Environment, file and the mapping of a program, the first counting most.

    Raises:
        ConfigurationError: names every unknown setting, and every text that cannot be read.
    """
    problems: list[str] = []
    found = [_environment(model, problems)]
    if (path := config_file()) is not None:
        found.append(_file(model, path, problems))
    if not isinstance(below, Mapping):
        raise ConfigurationError(f"wrong settings: {_PROGRAM} is a mapping of names to values")
    reader = _Reader(model, lambda names: f"{'.'.join(names)} in {_PROGRAM}", ".".join, problems)
    found.append(Layer(reader.table(model, below, ()), reader.place))
    if problems:
        raise ConfigurationError(f"wrong settings: {'; '.join(problems)}")
    return found


def config_file() -> Path | None:
    """The file that `CODE_WORKER_CONFIG` names; an empty variable names none."""
    return Path(path) if (path := os.environ.get(CONFIG_ENV, "").strip()) else None


def is_setting_variable(name: str, text: str) -> bool:
    """Returns whether a variable sets something.

    It has our prefix, is not empty, and is not there for another purpose.
    """
    if not name.upper().startswith(PREFIX) or name in _OTHERS or not text.strip():
        return False
    return _SERVICE_LINK.fullmatch(f"{name}={text}") is None


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the tables of one place; `problems` takes what is wrong, in words."""

    model: type[BaseModel]
    place: Callable[[_Names], str]
    written: Callable[[_Names], str]
    """A setting's name in the form of that place, to suggest it."""
    problems: list[str]

    def table(self, model: type[BaseModel], values: Mapping[Any, Any], above: _Names) -> dict[str, Any]:
        """The settings of a section, and of those in it, that are set."""
        found = {}
        for key, value in values.items():
            names = (*above, str(key))
            if (field := model.model_fields.get(str(key))) is None:
                self.problems.append(self.unknown(names))
            elif (read := self._read(field, value, names)) is not _UNSET:
                found[str(key)] = read
        return found

    def _read(self, field: FieldInfo, value: Any, names: _Names) -> Any:
        if isinstance(value, str):
            value = self._text(field, value, names)
        if is_section(field.annotation) and isinstance(value, Mapping):
            return self.table(field.annotation, value, names)
        if isinstance(value, bool) and _is_number(field):
            # Pydantic would take it for 0 or 1.
            self.problems.append(f"{self.place(names)}: {expected(self.model, names, 'bool')}")
            return _UNSET
        if isinstance(value, list | tuple) and any(isinstance(entry, str) and not entry.strip() for entry in value):
            self.problems.append(f"{self.place(names)}: an entry of the list is empty")
            return _UNSET
        return value

    def _text(self, field: FieldInfo, text: str, names: _Names) -> Any:
        """Returns what a text stands for; pydantic reads numbers and the like itself."""
        types = _types(field.annotation)
        if not text.strip():
            return _UNSET
        if NoneType in types and text.strip().lower() == "null":
            return None
        if tuple in types:
            return self._list(text.strip(), names)
        if is_section(field.annotation) or dict in types:
            return self._json(text, dict, "a table is written as a JSON object, or one setting at a time", names)
        return text if SecretStr in types else text.strip()

    def _list(self, text: str, names: _Names) -> Any:
        if text.startswith("["):
            form = """a list is written as a,b or, with quotes that the shell must not take away, as '["a", "b"]'"""
            return self._json(text, list, form, names)
        entries = [entry.strip() for entry in text.removesuffix(",").split(",")]
        if not all(entries):
            # As `$FIRST,$SECOND` with neither set: nothing at all would switch off what the list is for.
            self.problems.append(f"{self.place(names)}: an entry between commas is empty")
            return _UNSET
        return entries

    def _json(self, text: str, kind: type, form: str, names: _Names) -> Any:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, kind):
            return value
        self.problems.append(f"{self.place(names)}: {form}")
        return _UNSET

    def unknown(self, names: _Names) -> str:
        """Returns that there is no such setting, and what it may have been meant to be."""
        last = names[-1].upper()
        if last.startswith(PREFIX) and self.written is not _variable:
            return f"{self.place(names)} is no setting{self._without_prefix(last)}"
        settings = list(_known(self.model, ()))
        if len(names) == 1:
            # A section may be meant: `[wroker]` is nearer to `worker` than to any setting's whole name.
            settings += [(name,) for name in dict.fromkeys(each[0] for each in settings if len(each) > 1)]
        near = nearest(self.written(names), map(self.written, settings))
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{self.place(names)} is no setting{hint}"

    def _without_prefix(self, variable: str) -> str:
        names = tuple(variable[len(PREFIX) :].lower().split("__"))
        if names not in set(_known(self.model, ())):
            return "; names of variables are for the environment"
        return f'; in a file it is called "{".".join(names)}"'


def _environment(model: type[BaseModel], problems: list[str]) -> Layer:
    variables: dict[_Names, str] = {}
    tree: dict[str, Any] = {}

    def place(names: _Names) -> str:
        for length in range(len(names), 0, -1):
            if (variable := variables.get(names[:length])) is not None:
                # What remains is a key of a table that is written as JSON.
                return f"{variable} ({'.'.join(names[length:])})" if length < len(names) else variable
        return _variable(names)

    reader = _Reader(model, place, _variable, problems)
    for variable, text in sorted(os.environ.items(), key=lambda item: (item[0].count("__"), item[0])):
        if not is_setting_variable(variable, text):
            continue
        names = tuple(variable[len(PREFIX) :].lower().split("__"))
        if (other := variables.setdefault(names, variable)) != variable:
            problems.append(f"{other} and {variable} are one setting: take one of them away")
        elif (kind := _annotation(model, names)) is None:
            problems.append(reader.unknown(names))
        else:
            _plant(tree, names, _scalar(text) if kind is object else text)
    return Layer(reader.table(model, tree, ()), place)


def _variable(names: _Names) -> str:
    return f"{PREFIX}{'__'.join(names).upper()}"


def _plant(tree: dict[str, Any], names: _Names, value: Any) -> None:
    """Puts a value at its place; a section that was written as JSON before is opened for it."""
    for name in names[:-1]:
        below = tree.get(name, {})
        if isinstance(below, str):
            try:
                below = json.loads(below)
            except (ValueError, RecursionError):
                return  # the text itself is reported
        if not isinstance(below, dict):
            return
        tree[name] = tree = below
    tree[names[-1]] = value


def _file(model: type[BaseModel], path: Path, problems: list[str]) -> Layer:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"{CONFIG_ENV} names {path}, which is not there") from None
    except OSError as error:
        raise ConfigurationError(f"{CONFIG_ENV} names {path}, which cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from None
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise ConfigurationError(f"{path}: not TOML: {error}") from None

    def place(names: _Names) -> str:
        line = _line_of(names, text)
        return f"{'.'.join(names)} ({path}{f', line {line}' if line else ''})"

    reader = _Reader(model, place, ".".join, problems)
    return Layer(reader.table(model, values, ()), place)


def _line_of(names: _Names, text: str) -> int | None:
    """The line on which a TOML file sets it; None where it is written in a way that this does not follow."""
    table: _Names = ()
    for number, line in enumerate(text.split("\n"), 1):
        if header := _TABLE_LINE.match(line):
            table = _dotted(header[1])
            if table[: len(names)] == names:
                return number
        elif (key := _KEY_LINE.match(line)) and names[: len(set_here := (*table, *_dotted(key[1])))] == set_here:
            return number
    return None


def _dotted(text: str) -> _Names:
    return tuple(part.strip().strip("\"'") for part in text.split("."))


def expected(model: type[BaseModel], names: _Names, kind: str) -> str | None:
    """Returns what a setting takes, in words; None where the error itself says it better.

    Args:
        model: the settings.
        names: sections and name of the setting.
        kind: pydantic's name of the error.
    """
    field = _field(model, names)
    if kind == "dict_type" or (field is not None and is_section(field.annotation)):
        return f"is a table: [{'.'.join(names)}] and its settings below it" if "type" in kind else None
    if field is None:
        return None
    types = _types(field.annotation)
    if tuple in types:
        return _LIST_WANTED.get(kind)
    if bool in types:
        return "write true or false"
    number = "a whole number" if int in types else "a number" if float in types else None
    if number is None:
        return _TEXT_WANTED.get(kind)
    return f"write {number}{_bounds(field)}{', or null' if NoneType in types else ''}"


def _field(model: type[BaseModel], names: _Names) -> FieldInfo | None:
    *sections, last = names
    for name in sections:
        below = model.model_fields.get(name)
        if below is None or not is_section(below.annotation):
            return None
        model = below.annotation
    return model.model_fields.get(last)


def _is_number(field: FieldInfo) -> bool:
    types = _types(field.annotation)
    return bool({int, float} & types) and bool not in types


def _bounds(field: FieldInfo) -> str:
    found = {}
    for bound in field.metadata:
        found.update({name: getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name)})
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    return "".join(f" {words[name]} {found[name]}" for name in words if found.get(name) is not None)


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Returns whether a field is a table of settings."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _types(annotation: Any) -> set[Any]:
    """The types that a field may have, without what is in their brackets."""
    members = [annotation] if get_origin(annotation) in {None, tuple, dict} else get_args(annotation)
    return {get_origin(member) or member for member in members}


def _known(model: type[BaseModel], above: _Names) -> Iterator[_Names]:
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            yield from _known(field.annotation, (*above, name))
        else:
            yield (*above, name)


def _annotation(model: type[BaseModel], names: _Names) -> Any:
    """The type of a setting, `object` in a table whose keys are anybody's; None where there is no such setting."""
    for depth, name in enumerate(names, 1):
        if (field := model.model_fields.get(name)) is None:
            return None
        if not is_section(field.annotation):
            return field.annotation if depth == len(names) else object if dict in _types(field.annotation) else None
        model = field.annotation
    return model


def _scalar(text: str) -> Any:
    """A value whose type no setting says: JSON where it is, else text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
