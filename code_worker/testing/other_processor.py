"""Scores of a saved head with the kernels of a lesser processor, in a process of its own.

Numeric libraries choose their kernels once, when they are loaded, by what the processor has; each can be told to
choose as for a lesser one. `python -m code_worker.testing.other_processor FILE` is that process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.heads import Head

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NotTriedError", "scores_elsewhere"]

_LIMIT_S: Final = 300
_LEAST_OF_OPENBLAS: Final = {"x86_64": "Nehalem", "amd64": "Nehalem", "aarch64": "ARMV8", "arm64": "ARMV8"}


class NotTriedError(Exception):
    """The head could not be scored in another process; the text says why."""


def scores_elsewhere(
    head_class: type[Head], saved: Path, options: Mapping[str, Any], queries: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scores of `(n, 192) float32` queries by a head that `save` wrote into `saved`; one thread, lesser kernels.

    Writes beside `saved`.

    Raises:
        NotTriedError: the class cannot be imported by its name, or it failed there.
    """
    asked, given, found = (saved.with_name(f"{saved.name}-{what}") for what in ("asked.json", "in.npy", "out.npy"))
    np.save(given, queries)
    module = sys.modules.get(head_class.__module__)
    path = [str(Path(entry).absolute()) for entry in sys.path]
    facts = {
        "module": head_class.__module__,
        "name": head_class.__qualname__,
        "file": getattr(module, "__file__", None),
        "saved": str(saved),
        "options": dict(options),
        "queries": str(given),
        "scores": str(found),
    }
    asked.write_text(json.dumps(facts), encoding="utf-8")
    command = [sys.executable, "-P", "-m", __name__, str(asked)]
    environment = {**os.environ, **_lesser_kernels(), "PYTHONPATH": os.pathsep.join(path)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotTriedError(str(error)) from error
    if done.returncode or not found.is_file():
        said = done.stderr.strip().splitlines()
        raise NotTriedError(said[-1] if said else f"the process ended with status {done.returncode}")
    return np.asarray(np.load(found, allow_pickle=False))


def _lesser_kernels() -> dict[str, str]:
    simd = np.show_config(mode="dicts") or {}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    chosen = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(simd.get("SIMD Extensions", {}).get("found", ())),
        "OPENBLAS_CORETYPE": _LEAST_OF_OPENBLAS.get(platform.machine().lower(), ""),
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "FAISS_SIMD_LEVEL": "NONE",
    }
    return {**threads, **{name: value for name, value in chosen.items() if value}}


def _import(module: str, name: str, file: str | None) -> type[Head]:
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A single-file plugin has a module's name that no finder knows.
        if error.name != module or file is None:
            raise
        spec = importlib.util.spec_from_file_location(module, file)
        if spec is None or spec.loader is None:
            raise
        found = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    found = reduce(getattr, name.split("."), found)
    if not (isinstance(found, type) and issubclass(found, Head)):
        raise TypeError(f"{module}:{name} is no head where it is imported by that name")
    return found


def _main(asked: Path) -> None:
    facts = json.loads(asked.read_text(encoding="utf-8"))
    head = _import(facts["module"], facts["name"], facts["file"]).load(Path(facts["saved"]), facts["options"])
    np.save(facts["scores"], head.score(np.load(facts["queries"], allow_pickle=False)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
