"""The head under test, what it is tried with, and its scores with the kernels of a lesser processor."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from code_worker.heads import MAX_TOLERANCE, Head, fit_head, options_problem
from code_worker.types import EMBEDDING_DIM

_ROWS: Final = 1000


def sample_embeddings(rows: int = _ROWS, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Embeddings `(rows, 192) float32` that any head can tell apart, and labels `(rows,) int8` (0 real, 1 generated).

    Real ones lie round one point, generated ones round another, at right angles to it.
    """
    # (2, 192) → two of (192,): the same points for every seed, so that what one seed taught another can ask
    real, other = np.random.default_rng(1729).normal(size=(2, EMBEDDING_DIM))
    # (192,), Gram and Schmidt: what of `other` lies along `real` is taken away
    generated = other - real * (other @ real) / (real @ real)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % 2).astype(np.int8)
    # (rows, 1) chooses between two of (192,) → (rows, 192)
    centres = np.where(labels[:, None] == 0, real, generated)
    return (centres + rng.normal(scale=0.5, size=(rows, EMBEDDING_DIM))).astype(np.float32), labels


def hard_embeddings(rows: int = 600, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Embeddings and labels as `sample_embeddings` has them, that no head can tell apart.

    A third are of two classes that overlap, a third have labels at random, and the rest are copies of those two, half
    of them with the other label.
    """
    rng = np.random.default_rng((seed, 7))
    third = rows // 3
    overlapping, labels = sample_embeddings(third, seed)
    anyhow = rng.normal(size=(third, EMBEDDING_DIM))
    # (2 · third, 192); a tenth of the distance, under noise of unit variance
    found = np.concatenate((overlapping * 0.1 + rng.normal(size=(third, EMBEDDING_DIM)), anyhow))
    known = np.concatenate((labels, rng.integers(0, 2, third, dtype=np.int8)))
    copied = rng.integers(0, len(found), rows - 2 * third)
    turned = np.where(np.arange(len(copied)) % 2, 1 - known[copied], known[copied])
    return np.concatenate((found, found[copied])).astype(np.float32), np.concatenate((known, turned)).astype(np.int8)


def hard_queries(
    embeddings: NDArray[np.float32], labels: NDArray[np.int8], rows: int = _ROWS, seed: int = 0
) -> NDArray[np.float32]:
    """`(rows, 192) float32`: rows of the training data, points between its classes, others near it, and copies."""
    rng = np.random.default_rng((seed, 8))
    quarter = rows // 4
    known = embeddings[rng.integers(0, len(embeddings), quarter)]
    real, generated = (rng.choice(np.flatnonzero(labels == label), quarter) for label in (0, 1))
    # (quarter, 192), as far from the one as from the other
    between = (embeddings[real] + embeddings[generated]) / 2
    near = embeddings[rng.integers(0, len(embeddings), quarter)] + rng.normal(
        scale=0.3, size=(quarter, EMBEDDING_DIM)
    )
    found = np.concatenate((known, between, near)).astype(np.float32)
    return np.concatenate((found, found[rng.integers(0, len(found), rows - len(found))]))


class NotConformingError(Exception):
    """Raised with what a check found."""

    def __init__(self, expected: str, seen: str, fix: str) -> None:
        super().__init__(seen)
        self.expected, self.seen, self.fix = expected, seen, fix


def raised(error: BaseException, head_class: type[Head]) -> str:
    """Returns what a head raised and where in its code, in one line: `KeyError: 'k' (texture.py:12 in fit)`."""
    said = options_problem(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    classes = [one for one in head_class.__mro__ if one not in Head.__mro__]
    files = {getattr(sys.modules.get(one.__module__), "__file__", None) for one in classes}
    kit = str(Path(__file__).parent)
    own = [at for at in frames if at[0].co_filename in files]
    places = own or [at for at in frames if not at[0].co_filename.startswith(kit)]
    where = "".join(f" ({Path(code.co_filename).name}:{line} in {code.co_name})" for code, line in places[-1:])
    return f"{type(error).__name__}: {said}{where}"


class HeadUnderTest:
    """The head under test and what it is tried with; inputs are read-only, so that writing to one shows."""

    def __init__(self, head_class: type[Head], options: Mapping[str, Any], directory: Path) -> None:
        self.head_class = head_class
        self.options = options
        self.directory = directory
        self.train, self.train_labels = sample_embeddings(_ROWS, seed=1)
        self.embeddings, self.labels = sample_embeddings(97, seed=2)
        self.hard, self.hard_labels = hard_embeddings()
        self.queries = hard_queries(self.hard, self.hard_labels)
        for array in (self.train, self.train_labels, self.embeddings, self.hard, self.hard_labels, self.queries):
            array.flags.writeable = False
        self.head: Head

    @property
    def tolerance(self) -> float:
        """Returns how far two scores of one embedding may be apart, by the head's own word."""
        return min(float(self.head_class.tolerance), MAX_TOLERANCE)

    def fitted(self) -> Head:
        """A new head, fitted on the training data; one-class heads get its real images only."""
        return fit_head(self.head_class(self.options), self.train, self.train_labels)

    def fitted_to_hard_data(self) -> Head:
        """A new head, fitted on what cannot be told apart."""
        return fit_head(self.head_class(self.options), self.hard, self.hard_labels)

    def saved(self, name: str) -> Path:
        """A new directory that `save` has filled."""
        directory = self.directory / name
        directory.mkdir()
        self.head.save(directory)
        return directory


def largest_difference(first: NDArray[Any], second: NDArray[Any]) -> float:
    """The largest absolute difference, 0 for empty arrays."""
    return float(np.abs(first - second).max(initial=0.0))


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
    # The kernels are chosen when a library is loaded, so it takes a new process.
    # `-P`: nothing in the present directory may take the place of a module.
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
        # Everything beyond numpy's baseline that this processor has; the others name their libraries' least.
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
