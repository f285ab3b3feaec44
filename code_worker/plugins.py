"""Finds plugins, checks them, and answers which heads there are and which one to use.

Plugins come as entry points of the group `code_worker` and as single files in `PLUGINS_DIR`. They are code that runs
with this process's rights: install only what you trust. One that is broken stops the program with its name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, TypeVar

import pluggy

from code_worker import hookspecs
from code_worker.errors import PluginError, UnknownHeadError
from code_worker.heads import Head, HeadSpec
from code_worker.logs import get_logger
from code_worker.settings import Settings
from code_worker.types import Job

__all__ = ["HEAD_NAME", "InstalledPlugin", "Plugins", "load_plugins"]

T = TypeVar("T")
log = get_logger(__name__)
HEAD_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
"""Of a head, whole: as plugins register it and as manifests list it."""
_OWN: Final = "code-worker"
_HOOKS: Final = tuple(sorted(name for name in vars(hookspecs) if name.startswith(f"{hookspecs.PROJECT}_")))


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


def load_plugins(settings: Settings) -> Plugins:
    """Imports every plugin that is allowed, registers it, and asks for its heads.

    Raises:
        PluginError: an allowed one that is not installed, cannot be imported, implements a hook that does not exist,
            or offers a head that another offers too. The text names the plugin, where it is from, and the cause.
    """
    plugins = Plugins()
    for origin, entry_point in _allowed(settings.plugins_allowed):
        plugins.add(origin, _load(origin, entry_point.load))
    for path in _plugin_files(settings.plugins_dir):
        origin = _file_origin(path)
        plugins.add(origin, _load(origin, partial(_import_file, path)))
    return plugins


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
                specs.extend(_load(origin, partial(_call_all, implementation.function)))
        return specs

    def _add_head(self, origin: InstalledPlugin, spec: object) -> None:
        if not isinstance(spec, HeadSpec):
            raise PluginError(f"plugin {origin} offers a {type(spec).__name__} where a HeadSpec is expected")
        if HEAD_NAME.fullmatch(spec.name) is None:
            raise PluginError(
                f"plugin {origin} offers a head called {spec.name!r}: names are 1 to 64 lower case letters, digits, "
                "'-' and '_', and begin with a letter or digit"
            )
        if (other := self._providers.get(spec.name)) is not None:
            raise PluginError(
                f"head {spec.name!r} is offered by {self._installed[other]} and by {origin}; remove one or rename it"
            )
        self._heads[spec.name] = spec
        self._providers[spec.name] = origin.name

    def heads(self) -> dict[str, HeadSpec]:
        """Every head on offer, by name."""
        return dict(sorted(self._heads.items()))

    def head_class(self, name: str) -> type[Head]:
        """The class of a head, imported now.

        Raises:
            UnknownHeadError: no plugin offers it.
            PluginError: its module cannot be imported.
        """
        self.provider(name)
        return self._heads[name].head_class()

    def provider(self, name: str) -> InstalledPlugin:
        """The plugin that offers a head.

        Raises:
            UnknownHeadError: none does.
        """
        if name not in self._providers:
            raise UnknownHeadError(name, tuple(sorted(self._heads)))
        return self._installed[self._providers[name]]

    def select_head(self, job: Job, names: Sequence[str]) -> str | None:
        """What the first plugin with an opinion says; the one registered last is asked first, files before packages.

        Raises:
            PluginError: the answer is no text. What a plugin itself raises passes through.
        """
        chosen = self._manager.hook.code_worker_select_head(job=job, heads=tuple(names))
        if chosen is not None and not isinstance(chosen, str):
            raise PluginError(f"code_worker_select_head answered {type(chosen).__name__}, not the name of a head")
        return chosen

    def installed(self) -> list[InstalledPlugin]:
        """Every plugin in use, in the order of registration."""
        return list(self._installed.values())


def _call_all(offer: Callable[..., Any]) -> list[HeadSpec]:
    return list(offer())


def _allowed(names: Sequence[str] | None) -> Iterator[tuple[InstalledPlugin, EntryPoint]]:
    """Entry points of the distributions that may be imported; of the others nothing is imported."""
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
            yield origin, entry_point
        else:
            log.warning("plugin_not_allowed", plugin=origin.name, distribution=origin.distribution)


def _canonical(distribution: str) -> str:
    """As package indexes compare names."""
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


def _plugin_files(directory: Path | None) -> Iterator[Path]:
    """Files of the directory in order; names with a leading underscore are parts of others, not plugins."""
    if directory is None:
        return
    directory = directory.expanduser().absolute()
    if not directory.is_dir():
        raise PluginError(f"CODE_WORKER_PLUGINS_DIR names {directory}, which is not a directory")
    yield from sorted(path for path in directory.glob("*.py") if not path.name.startswith("_"))


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
        raise PluginError(f"plugin {origin} cannot be loaded: {type(error).__name__}: {error}") from error


def _check_names(origin: InstalledPlugin, plugin: object) -> None:
    """Refuses what looks like a hook but would never be called: a wrong name, or a missing `@hookimpl`."""
    members: Mapping[str, object] = dict(inspect.getmembers_static(plugin))
    for name, member in members.items():
        if not name.startswith(f"{hookspecs.PROJECT}_") or not inspect.isroutine(member):
            continue
        if name not in _HOOKS:
            close = get_close_matches(name, _HOOKS, 1, cutoff=0.8)
            hint = f"did you mean {close[0]}?" if close else f"hooks: {', '.join(_HOOKS)}"
            raise PluginError(f"plugin {origin} implements {name}, which is no hook; {hint}")
        if not hasattr(member, f"{hookspecs.PROJECT}_impl"):
            raise PluginError(f"plugin {origin} defines {name} without @hookimpl: it would never be called")
