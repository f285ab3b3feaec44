"""Writes a new plugin from the templates beside this file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template

from code_worker.errors import ConfigurationError


def write_plugin(head: str, parent: Path) -> Path:
    """Writes `code-worker-NAME/` with a package, a head, a test and a README; returns the directory.

    Args:
        head: name of the head, as users write it.
        parent: existing directory to put the plugin's directory into.

    Raises:
        ConfigurationError: the directory exists already, or cannot be written.
    """
    module = f"code_worker_{head.replace('-', '_')}"
    names = {
        "head": head,
        "module": module,
        "distribution": module.replace("_", "-"),
        "class_name": "".join(part.capitalize() for part in module.removeprefix("code_worker_").split("_")) + "Head",
    }
    targets = {
        "pyproject.toml.template": "pyproject.toml",
        "README.md.template": "README.md",
        "head.py.template": f"{module}.py",
        "test.py.template": f"test_{module}.py",
    }
    directory = parent / names["distribution"]
    try:
        directory.mkdir()
        for template, target in targets.items():
            text = files("code_worker.cli.scaffold").joinpath(template).read_text(encoding="utf-8")
            (directory / target).write_text(Template(text).substitute(names), encoding="utf-8")
    except FileExistsError:
        raise ConfigurationError(f"{directory} exists already; remove it or choose another name") from None
    except OSError as error:
        raise ConfigurationError(f"{directory} cannot be written: {error.strerror}") from error
    return directory
