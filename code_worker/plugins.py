"""Finds plugins, checks them, and answers which heads there are and which one to use.

Plugins come as entry points of the group `code_worker` and as single files in `PLUGINS_DIR`. They are code that runs
with this process's rights: install only what you trust. One that is broken stops the program with its name. Files
beside them that name no hook, and tests, are not plugins; plugins can import them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

import pluggy

from code_worker import hookspecs
from code_worker.errors import PluginError, UnknownHeadError, nearest
from code_worker.heads import Head, HeadSpec
from code_worker.logs import get_logger
from code_worker.settings import Settings
from code_worker.system.files import expanded
from code_worker.system.processes import raise_if_stop
from code_worker.types import Job

__all__ = ["HEAD_NAME", "FoundPlugin", "InstalledPlugin", "Plugins", "find_plugins", "load_plugins"]


T = TypeVar("T")
log = get_logger(__name__)
HEAD_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
"""Of a head, whole: as plugins register it and as manifests list it."""
_OWN: Final = "code-worker"
_NOT_ALLOWED: Final = "not allowed"
_TEST_FILE: Final = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py")
_HOOKS: Final = tuple(sorted(name for name in vars(hookspecs) if name.startswith(f"{hookspecs.PROJECT}_")))
_NAMES_A_HOOK: Final = re.compile(rf"\bhookimpl\b|\bdef {hookspecs.PROJECT}_|\b({'|'.join(_HOOKS)})\b")


@dataclass(frozen=True, slots=True)
class InstalledPlugin:
    """A plugin in use and where it came from.

    Attributes:
        name: of the entry point, or the file's stem.
        version: of the distribution; for a file the first figures of its sha256.
        distribution: installed package that declares it; for a file its stem.
        hooks: names of the hooks it implements.
        heads: names of the heads it offers.
        path: the file, for a plugin that is one.
    """

    name: str
    version: str
    distribution: str
    hooks: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def release(self) -> str:
        """Distribution and version, as verdicts name what scored."""
        return f"{self.distribution} {self.version}".strip()

    def __str__(self) -> str:
        return str(self.path) if self.path else f"{self.name!r} of {self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class FoundPlugin:
    """A plugin or file that is there, and what becomes of it.

    Attributes:
        plugin: what it is and where it is from.
        state: `in use`, `refused` (it is broken, and stops every program), `not allowed` (by
            `CODE_WORKER_PLUGINS_ALLOWED`) or `passed over` (a file that is no plugin).
        why: the reason, unless it is in use.
    """

    plugin: InstalledPlugin
    state: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A possible plugin: how to import it, or why that is not done."""

    origin: InstalledPlugin
    load: Callable[[], object] = object
    state: str = ""
    why: str = ""


def find_plugins(settings: Settings) -> list[FoundPlugin]:
    """Everything that `load_plugins` meets, with what it would do; a broken plugin does not hide the others.

    Raises:
        PluginError: a directory or a distribution in the settings that is not there.
    """
    plugins = Plugins()
    return [_tried(plugins, candidate) for candidate in _candidates(settings)]


def _tried(plugins: Plugins, candidate: _Candidate) -> FoundPlugin:
    if candidate.state:
        return FoundPlugin(candidate.origin, candidate.state, candidate.why)
    try:
        plugins.add(candidate.origin, _load(candidate.origin, candidate.load))
    except PluginError as error:
        return FoundPlugin(candidate.origin, "refused", str(error))
    return FoundPlugin(plugins.installed()[-1], "in use")


def load_plugins(settings: Settings) -> Plugins:
    """Imports every plugin that is allowed, registers it, and asks for its heads.

    Raises:
        PluginError: an allowed one that is not installed, cannot be imported, implements a hook that does not exist,
            offers a head that another offers too, or what is no head. The text names the plugin, where it is from,
            and the cause.
    """
    plugins = Plugins()
    for candidate in _candidates(settings):
        if not candidate.state:
            plugins.add(candidate.origin, _load(candidate.origin, candidate.load))
        elif candidate.state == _NOT_ALLOWED:
            origin = candidate.origin
            log.warning("plugin_not_allowed", plugin=origin.name, distribution=origin.distribution)
        else:
            log.info("plugin_file_passed_over", file=str(candidate.origin.path), why=candidate.why)
    return plugins


def _candidates(settings: Settings) -> Iterator[_Candidate]:
    yield from _installed_candidates(settings.plugins_allowed)
    yield from _file_candidates(settings.plugins_dir)


class Plugins:
    """The plugins of this process; `load_plugins` builds one, callers pass it on."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._installed: dict[str, InstalledPlugin] = {}
        self._heads: dict[str, HeadSpec] = {}
        self._providers: dict[str, str] = {}

    def add(self, origin: InstalledPlugin, plugin: object) -> None:
        """Registers one plugin and the heads it offers.

        Raises:
            PluginError: see `load_plugins`.
        """
        if (other := self._installed.get(origin.name)) is not None:
            raise PluginError(f"two plugins are called {origin.name!r}: {other} and {origin}; remove one")
        _check_names(origin, plugin)
        try:
            self._manager.register(plugin, origin.name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin {origin} cannot be registered: {error}") from error
        callers = self._manager.get_hookcallers(plugin) or []
        self._installed[origin.name] = origin
        for spec in self._offered(origin, plugin):
            self._add_head(origin, spec)
        names = tuple(name for name, provider in self._providers.items() if provider == origin.name)
        hooks = tuple(sorted(caller.name for caller in callers))
        self._installed[origin.name] = replace(origin, hooks=hooks, heads=names)

    def _offered(self, origin: InstalledPlugin, plugin: object) -> list[HeadSpec]:
        hook = self._manager.hook.code_worker_register_heads
        specs: list[HeadSpec] = []
        for implementation in hook.get_hookimpls():
            if implementation.plugin is plugin:
                if implementation.wrapper or implementation.hookwrapper:
                    raise PluginError(
                        f"plugin {origin} wraps code_worker_register_heads: each plugin is asked for its own heads, "
                        "so there is nothing to wrap; wrapper=True is for code_worker_select_head"
                    )
                specs.extend(_load(origin, partial(_call_all, implementation.function)))
        return specs

    def _add_head(self, origin: InstalledPlugin, spec: object) -> None:
        if not isinstance(spec, HeadSpec):
            raise PluginError(f"plugin {origin} offers {_named(spec)} where a HeadSpec is expected")
        if HEAD_NAME.fullmatch(spec.name) is None:
            raise PluginError(
                f"plugin {origin} offers a head called {spec.name!r}: names are 1 to 64 lower case letters, digits, "
                "'-' and '_', and begin with a letter or digit"
            )
        if (other := self._providers.get(spec.name)) is not None:
            raise PluginError(
                f"head {spec.name!r} is offered by {self._installed[other]} and by {origin}; remove one or rename it"
            )
        variable = spec.name.replace("-", "_")
        if alike := next((name for name in self._heads if name.replace("-", "_") == variable), None):
            raise PluginError(
                f"heads {alike!r} of {self.provider(alike)} and {spec.name!r} of {origin} would share the settings "
                f"CODE_WORKER_HEADS__{variable.upper()}__…; remove one or rename it"
            )
        if not isinstance(spec.target, str):
            _class_of(origin, spec)
        self._heads[spec.name] = spec
        self._providers[spec.name] = origin.name

    def heads(self) -> dict[str, HeadSpec]:
        """Every head on offer, by name."""
        return dict(sorted(self._heads.items()))

    def head_class(self, name: str) -> type[Head]:
        """The class of a head, imported now.

        Raises:
            UnknownHeadError: no plugin offers it.
            PluginError: its module cannot be imported, or it is no head.
        """
        return _class_of(self.provider(name), self._heads[name])

    def provider(self, name: str) -> InstalledPlugin:
        """The plugin that offers a head.

        Raises:
            UnknownHeadError: none does.
        """
        if name not in self._providers:
            raise UnknownHeadError(name, tuple(sorted(self._heads)))
        return self._installed[self._providers[name]]

    def select_head(self, job: Job, names: Sequence[str]) -> str | None:
        """Returns what the first plugin with an opinion says.

        The one registered last is asked first, files before packages.

        Raises:
            PluginError: a plugin failed, or its answer is no text; the text names the plugin where that is known.
        """
        try:
            chosen = self._manager.hook.code_worker_select_head(job=job, heads=tuple(names))
        except (Exception, SystemExit) as error:  # a plugin is somebody else's code and may raise anything at all
            raise_if_stop(error)
            raise PluginError(
                f"code_worker_select_head of {self.chooser_in(traceback.walk_tb(error.__traceback__))} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if chosen is not None and not isinstance(chosen, str):
            raise PluginError(f"code_worker_select_head answered {_named(chosen)}, not the name of a head")
        return chosen

    def chooser_in(self, stack: Iterable[tuple[FrameType, int]]) -> str:
        """The plugin whose choice of a head runs in a stack or traceback, with its line there."""
        lines = {frame.f_code: line for frame, line in stack}
        for implementation in self._manager.hook.code_worker_select_head.get_hookimpls():
            code = getattr(implementation.function, "__code__", None)
            if code in lines:
                return f"plugin {self._installed[implementation.plugin_name]} (line {lines[code]})"
        return "a plugin"

    def installed(self) -> list[InstalledPlugin]:
        """Every plugin in use, in the order of registration."""
        return list(self._installed.values())


def _class_of(origin: InstalledPlugin, spec: HeadSpec) -> type[Head]:
    try:
        return spec.head_class()
    except PluginError as error:
        raise PluginError(f"plugin {origin}: {error}") from error


def _call_all(offer: Callable[..., Any]) -> list[HeadSpec]:
    offered: object = offer()
    if not isinstance(offered, Iterable):
        raise TypeError(f"code_worker_register_heads must return a list of HeadSpec, not {_named(offered)}")
    return list(offered)


def _named(found: object) -> str:
    """Returns what somebody's code gave where something else is expected; a class by its name."""
    return f"the class {found.__qualname__}" if isinstance(found, type) else f"a value of type {type(found).__name__}"


def _installed_candidates(names: Sequence[str] | None) -> Iterator[_Candidate]:
    """Entry points; of distributions that may not be imported nothing is."""
    allowed = None if names is None else {_canonical(name): name for name in (_OWN, *names)}
    offered = [(_entry_point_origin(found), found) for found in entry_points(group=hookspecs.PROJECT)]
    present = {_canonical(origin.distribution) for origin, _ in offered}
    if absent := sorted(name for key, name in (allowed or {}).items() if key not in present | {_OWN}):
        raise PluginError(
            f"CODE_WORKER_PLUGINS_ALLOWED names {', '.join(absent)}, of which no plugin is installed; "
            f"installed: {', '.join(sorted(present))}"
        )
    for origin, entry_point in sorted(offered, key=lambda offer: offer[1].name):
        if allowed is None or _canonical(origin.distribution) in allowed:
            yield _Candidate(origin, entry_point.load)
        else:
            why = f"CODE_WORKER_PLUGINS_ALLOWED does not name {origin.distribution}"
            yield _Candidate(origin, state=_NOT_ALLOWED, why=why)


def _canonical(distribution: str) -> str:
    """Returns the name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _entry_point_origin(entry_point: EntryPoint) -> InstalledPlugin:
    distribution = entry_point.dist
    name, version = (distribution.name, distribution.version) if distribution else ("unknown", "")
    return InstalledPlugin(entry_point.name, version, name)


def _file_origin(path: Path) -> InstalledPlugin:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PluginError(f"plugin {path} cannot be read: {error.strerror}") from error
    return InstalledPlugin(path.stem, f"sha256:{digest[:12]}", path.stem, path=path)


def _file_candidates(directory: Path | None) -> Iterator[_Candidate]:
    """Files of the directory in order; what they import from beside them is found."""
    if directory is None:
        return
    directory = expanded(directory, "CODE_WORKER_PLUGINS_DIR")
    if not directory.is_dir():
        raise PluginError(f"CODE_WORKER_PLUGINS_DIR names {directory}, which is not a directory")
    if str(directory) not in sys.path:
        # Last: a file must not take the place of an installed module. For good: hooks may import when they run.
        sys.path.append(str(directory))
    for path in sorted(directory.glob("*.py")):
        why = _why_no_plugin(path)
        yield _Candidate(_file_origin(path), partial(_import_file, path), state="passed over" if why else "", why=why)


def _why_no_plugin(path: Path) -> str:
    if path.name.startswith("_"):
        return "its name begins with _: a part of others"
    if _TEST_FILE.fullmatch(path.name):
        return "its name is that of a test"
    try:
        named = _NAMES_A_HOOK.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise PluginError(f"plugin {path} cannot be read: {error.strerror}") from error
    return "" if named else "it names no hook"


def _import_file(path: Path) -> object:
    name = f"{hookspecs.PROJECT}_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not importable")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load(origin: InstalledPlugin, load: Callable[[], T]) -> T:
    try:
        return load()
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # a plugin is somebody else's code and may raise anything at all
        raise_if_stop(error)
        raise PluginError(f"plugin {origin} cannot be loaded: {type(error).__name__}: {error}") from error


def _check_names(origin: InstalledPlugin, plugin: object) -> None:
    """Refuses what looks like a hook but would never be called: a wrong name, or a missing `@hookimpl`."""
    members: Mapping[str, object] = dict(inspect.getmembers_static(plugin))
    for name, member in members.items():
        if not name.startswith(f"{hookspecs.PROJECT}_") or not inspect.isroutine(member):
            continue
        if name not in _HOOKS:
            close = nearest(name, _HOOKS, cutoff=0.8)
            hint = f"did you mean {close[0]}?" if close else f"hooks: {', '.join(_HOOKS)}"
            raise PluginError(f"plugin {origin} implements {name}, which is no hook; {hint}")
        if not hasattr(member, f"{hookspecs.PROJECT}_impl"):
            raise PluginError(f"plugin {origin} defines {name} without @hookimpl: it would never be called")
        given = list(inspect.signature(getattr(hookspecs, name)).parameters)
        asked = inspect.signature(getattr(plugin, name)).parameters.values()
        needed = {one.name for one in asked if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
        if wrong := sorted(needed.difference(given)):
            may = f"it may take {' and '.join(given)}" if given else "it takes none"
            raise PluginError(f"plugin {origin}: {name} has no argument {', '.join(wrong)}; {may}")
