"""Imports libraries so that they report nothing to their makers, and leave nothing in a home."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

_REFUSALS: Final = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DO_NOT_TRACK": "1",  # https://donottrack.sh: for anything that joins them
}
_OPENVINO: Final = ("openvino", "openvino_telemetry")


@contextmanager
def silent_import() -> Iterator[None]:
    """Libraries that are imported within the block are told not to report; the environment is as before afterwards.

    Where the package `openvino_telemetry` is not installed, OpenVINO uses a stub that does nothing. So that package
    is hidden meanwhile, and OpenVINO keeps the stub for as long as the process lives.
    """
    # Once either is imported its choice is made, and hiding the package would only confuse others.
    hidden = not sys.modules.keys() & set(_OPENVINO)
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # an import then raises ImportError
    try:
        with _environment(_REFUSALS):
            yield
    finally:
        if hidden:
            sys.modules.pop("openvino_telemetry", None)


@contextmanager
def import_without_home() -> Iterator[None]:
    """Has matplotlib, imported within the block, keep its list of fonts for this process alone.

    It would make directories in the home, or in the one that `MPLCONFIGDIR` names, which is left to it.
    """
    if "matplotlib" in sys.modules or "MPLCONFIGDIR" in os.environ:
        yield
        return
    directory = tempfile.mkdtemp(prefix="code-worker-matplotlib-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    with _environment({"MPLCONFIGDIR": directory}):
        yield


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        # Leniently: another thread may have been in here at the same time.
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
