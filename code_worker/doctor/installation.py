"""Checks of this machine: settings, Python, disk, image directories, plugins, device."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker._version import __version__
from code_worker.doctor.check import Check, Status
from code_worker.errors import ConfigurationError, PluginError, nearest
from code_worker.heads import head_spelt, read_options, unknown_head_settings
from code_worker.settings import Settings
from code_worker.settings.configuration import PREFIX, config_file, is_setting_variable
from code_worker.system.files import expanded

if TYPE_CHECKING:
    from code_worker.plugins import Plugins

_FREE_FAIL: Final = 2**30
_FREE_WARN: Final = 5 * 2**30


def python() -> Iterator[Check]:
    """Versions, and whether a worker could run here."""
    versions = {name: _version(name) for name in ("torch", "timm", "scikit-learn", "boto3")}
    text = f"code-worker {__version__}, Python {platform.python_version()}, celery {_version('celery')}"
    missing = [name for name, found in versions.items() if not found]
    if missing:
        yield Check(
            "python",
            Status.WARN,
            f"{text}; no {', '.join(missing)}: enough to enqueue, not to judge",
            "pip install 'code-worker[worker]'",
        )
    else:
        yield Check("python", Status.OK, f"{text}, torch {versions['torch']}, timm {versions['timm']}")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def environment(_settings: Settings) -> Iterator[Check]:
    """Yields where the settings come from; loading them has refused what is none."""
    found = sum(is_setting_variable(name, text) for name, text in os.environ.items())
    yield Check("settings", Status.OK, f"{found} from the environment, {config_file() or 'no file'}")


def data_directory(settings: Settings) -> Iterator[Check]:
    """Writable, private, and with room left."""
    path = settings.data_path
    if not path.is_dir():
        yield Check("data directory", Status.WARN, f"{path} does not exist yet", "code-worker up makes it")
        return
    # Written to, since a full disk lets an empty file be made; without a name, so that nothing of it is left.
    with tempfile.TemporaryFile(dir=path) as probe:
        probe.write(b"x" * 4096)
        probe.flush()
    exposed = [place for place in (path, *_with_secrets(path)) if stat.S_IMODE(place.stat().st_mode) & 0o077]
    for place in exposed:
        mode = stat.S_IMODE(place.stat().st_mode)
        hint = f"chmod {'700' if place.is_dir() else '600'} {place}"
        yield Check("data directory", Status.WARN, f"{place} is open to others ({mode:o})", hint)
    if not exposed:
        yield Check("data directory", Status.OK, f"{path} is writable and private")
    yield _room(path)


def _with_secrets(directory: Path) -> list[Path]:
    """The database, and where the embedded broker's password stands."""
    patterns = ("code_worker.db*", "broker/valkey.conf", "broker/address", "run/broker.url")
    return sorted(path for pattern in patterns for path in directory.glob(pattern))


def _room(path: Path) -> Check:
    free = shutil.disk_usage(path).free
    text = f"{free / 2**30:.1f} GiB free at {path}"
    hint = f"free some space, or move the data: {PREFIX}DATA_DIR"
    if free < _FREE_FAIL:
        return Check("disk", Status.FAIL, text, hint)
    return Check("disk", Status.WARN, text, hint) if free < _FREE_WARN else Check("disk", Status.OK, text)


def image_directories(settings: Settings) -> Iterator[Check]:
    """Roots under which local images may be read."""
    if not settings.files.roots:
        yield Check("files", Status.OK, "not configured: no local file is read")
    for root in settings.files.roots:
        path = expanded(root, f"{PREFIX}FILES__ROOTS")
        if path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            yield Check("files", Status.OK, f"{path} is readable")
        else:
            yield Check(
                "files",
                Status.FAIL,
                f"{path} is no directory that this user can read",
                f"mend it, or take it out of {PREFIX}FILES__ROOTS",
            )


def plugins(settings: Settings) -> Iterator[Check]:
    """Every plugin loads, and there are heads."""
    from code_worker.plugins import load_plugins  # imports strangers' code

    loaded = load_plugins(settings)
    names = sorted(f"{each.name} {each.version or ''}".strip() for each in loaded.installed())
    heads = sorted(loaded.heads())
    if settings.head is None or settings.head in heads:
        yield Check("plugins", Status.OK, f"{', '.join(names)}; heads: {', '.join(heads)}")
    else:
        yield Check(
            "plugins",
            Status.FAIL,
            f"the default head {settings.head!r} is not among {', '.join(heads) or 'none'}",
            f"{_meant(settings.head, heads)}install its plugin, or set {PREFIX}HEAD",
        )
    yield from _head_settings(settings, loaded)


def _head_settings(settings: Settings, loaded: Plugins) -> Iterator[Check]:
    """Yields what is wrong with `CODE_WORKER_HEADS`."""
    heads = sorted(loaded.heads())
    for wrong in unknown_head_settings(settings.heads, heads):
        yield Check(
            "plugins", Status.WARN, wrong, "a refit refuses them, unless the champion has a head of that name"
        )
    for written, options in settings.heads.items():
        if name := head_spelt(written, heads):
            try:
                read_options(name, loaded.head_class(name), options)
            except ConfigurationError as error:
                # No failure: a champion's own options, which are not known here, may complete them.
                hint = f"mend [heads.{written}]: a refit refuses them, unless the champion's options complete them"
                yield Check("plugins", Status.WARN, str(error), hint)
            except PluginError as error:
                yield Check("plugins", Status.WARN, f"options of head {name!r} were not looked at: {error}")


def _meant(name: str, names: Sequence[str]) -> str:
    near = nearest(name, names)
    return f"did you mean {near[0]}? If not, " if near else ""


def decoding(_settings: Settings) -> Iterator[Check]:
    """Yields whether photographs are decoded whole or where the model looks."""
    from code_worker.images.region import region_decoder

    works, text = region_decoder()
    if works:
        yield Check("decoding", Status.OK, f"only the centre of a JPEG, by {text}")
    elif text == "not installed":
        yield Check(
            "decoding", Status.OK, "JPEG whole, by Pillow; pip install code-worker-jpeg decodes only the centre"
        )
    else:
        yield Check(
            "decoding",
            Status.WARN,
            f"JPEG whole, by Pillow: {text}",
            "pip install --force-reinstall code-worker-jpeg",
        )


def device(settings: Settings) -> Iterator[Check]:
    """The encoder's device and arithmetic, tried on one black crop with random weights."""
    from code_worker.encoder.engines import open_engine
    from code_worker.encoder.weights import random_weights

    engine = open_engine(
        random_weights(0), engine=settings.engine, device=settings.device, precision=settings.precision
    )
    engine.warm_up()
    yield Check("device", Status.OK, f"{engine.device} encodes in {engine.precision}, {engine.kernels} kernels")
