"""`code-worker plugins`: what is installed, a new one, and whether one keeps the rules."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from code_worker.cli.arguments import JSON_OBJECT, json_option
from code_worker.cli.output import print_json_lines, print_table
from code_worker.errors import ConfigurationError
from code_worker.settings import load_settings

if TYPE_CHECKING:
    from code_worker.plugins import Plugins

__all__ = ["plugins"]

# Narrower than a head's name: a class, a module and a distribution are named after it.
_NEW_NAME: Final = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


@click.group()
def plugins() -> None:
    """List, create and check plugins.

    A plugin is code that runs with your rights: install only what you trust.
    """


@plugins.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List every plugin in use: packages by entry point, and files of CODE_WORKER_PLUGINS_DIR."""
    rows = [asdict(plugin) for plugin in _load().installed()]
    if as_json:
        print_json_lines(rows)
        return
    shown = [{**row, "hooks": " ".join(row["hooks"]), "heads": " ".join(row["heads"])} for row in rows]
    print_table(shown, ("name", "version", "distribution", "heads", "hooks", "path"), empty="no plugin is installed")


def _load() -> Plugins:
    from code_worker.plugins import load_plugins  # noqa: PLC0415 - imports strangers' code

    return load_plugins(load_settings())


@plugins.command("new")
@click.argument("name")
@click.option(
    "--dir",
    "parent",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Where to put its directory; unset: here.",
)
def new(name: str, parent: Path) -> None:
    """Write a plugin to start from, with a head called NAME and a test that passes."""
    from code_worker.cli.scaffold import write_plugin  # noqa: PLC0415 - only this command needs it
    from code_worker.plugins import HEAD_NAME  # noqa: PLC0415 - not for --help

    if _NEW_NAME.fullmatch(name) is None or HEAD_NAME.fullmatch(name) is None:
        raise ConfigurationError(
            f"{name!r} cannot name a new plugin: begin with a lower case letter, go on with lower case letters and "
            "digits, put a single '-' or '_' between words only, and use at most 64 characters"
        )
    loaded = _load()
    if name in loaded.heads():
        raise ConfigurationError(f"there is a head called {name!r} already, of plugin {loaded.provider(name)}")
    directory = write_plugin(name, parent)
    click.echo(f"wrote {directory}")
    click.echo(f"next: pip install -e '{directory}[test]' && pytest {directory} && code-worker plugins check {name}")


@plugins.command("check")
@click.argument("name")
@click.option("--options", type=JSON_OBJECT, default="{}", help="Options of the head, as a JSON object.")
@json_option
def check(*, name: str, options: dict[str, Any], as_json: bool) -> None:
    """Run the conformance kit on the head NAME, or on every head of the plugin NAME.

    Exit status: 0 all checks passed; 1 some failed; 2 there is no such head or plugin, or it cannot be loaded.
    """
    from code_worker.testing import check_head  # noqa: PLC0415 - numpy, and the head itself

    loaded = _load()
    specs = {head: loaded.heads()[head] for head in _heads_of(loaded, name)}
    rows = [{"head": head, **asdict(result)} for head, spec in specs.items() for result in check_head(spec, options)]
    if as_json:
        print_json_lines(rows)
    else:
        shown = [{**row, "result": "passed" if row["passed"] else "FAILED", "check": row["name"]} for row in rows]
        columns = ("head", "check", "result", "expected", "seen", "fix")
        print_table(shown, columns, empty=f"plugin {name} loads; it offers no head to check")
    if not all(row["passed"] for row in rows):
        sys.exit(1)


def _heads_of(loaded: Plugins, name: str) -> tuple[str, ...]:
    if name in loaded.heads():
        return (name,)
    for plugin in loaded.installed():
        if plugin.name == name:
            return plugin.heads
    known = sorted({*loaded.heads(), *(plugin.name for plugin in loaded.installed())})
    raise ConfigurationError(f"no head and no plugin is called {name!r}; known: {', '.join(known)}")
