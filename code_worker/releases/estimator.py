"""Reads a published scikit-learn estimator (`.sav`, `.joblib`, `.pkl`) as data, without unpickling it."""

from __future__ import annotations

import bz2
import lzma
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from code_worker.disk import is_lfs_pointer
from code_worker.errors import ArtifactError, UnsafeArtifactError
from code_worker.heads import EstimatorState
from code_worker.releases.pickled import Array, Instance, Name, read_pickle

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EstimatorState", "read_estimator"]

ESTIMATORS: Final = frozenset(
    {
        Name("sklearn.linear_model._logistic", "LogisticRegression"),
        Name("sklearn.neighbors._classification", "KNeighborsClassifier"),
        Name("sklearn.svm._classes", "OneClassSVM"),
    }
)
MAX_BYTES: Final = 4 * 2**30
MAX_INFLATION: Final = 64
"""A compressed file may hold this many times its own size; embeddings compress by a few percent."""
_MAX_TEXT: Final = 1000
_MAX_NESTED: Final = 100


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def read_estimator(path: Path) -> EstimatorState:
    """State of the `LogisticRegression`, `KNeighborsClassifier` or `OneClassSVM` that `path` holds.

    Arrays are read-only views of the file's bytes, in the file's byte order: copy what is kept.

    Raises:
        UnsafeArtifactError: the file asks for anything but those classes and numpy arrays; nothing was executed.
        ArtifactError: the file is missing, damaged, or compressed in a form that is not read.
    """
    if is_lfs_pointer(path):
        raise ArtifactError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ArtifactError(f"{path}: {size} bytes are more than the {MAX_BYTES} that an estimator may have")
        content = _decompressed(path.read_bytes())
        return _state(read_pickle(content, ESTIMATORS))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    except UnsafeArtifactError as error:
        raise UnsafeArtifactError(f"{path}: {error}") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _decompressed(content: bytes) -> bytes:
    decompressor: _Decompressor
    if content.startswith((b"\x1f\x8b", b"\x78")):
        decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    elif content.startswith(b"BZh"):
        decompressor = bz2.BZ2Decompressor()
    elif content.startswith((b"\xfd7zXZ", b"\x5d\x00")):
        decompressor = lzma.LZMADecompressor(memlimit=2**28)
    elif content.startswith(b"\x04\x22\x4d\x18"):
        raise ArtifactError("compressed with lz4: write it again with joblib.dump(estimator, path, compress=0)")
    else:
        return content
    limit = MAX_INFLATION * len(content) + 2**20
    try:
        inflated = decompressor.decompress(content, limit)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise ArtifactError(f"damaged compressed file: {error}") from error
    if not decompressor.eof:
        raise ArtifactError(f"cut short, or more than {limit} bytes once decompressed")
    return inflated


def _state(found: object) -> EstimatorState:
    if not isinstance(found, Instance) or found.state is None:
        raise ArtifactError("holds no fitted estimator")
    arrays: dict[str, NDArray[Any]] = {}
    params: dict[str, Any] = {}
    for name, value in found.state.items():
        if not isinstance(name, str):
            raise ArtifactError("an attribute of the estimator has no name")
        if isinstance(value, Array) and value.value is not None:
            arrays[name] = value.value
        elif _is_plain(value):
            params[name] = value
        else:
            raise ArtifactError(f"attribute {name[:100]!r} of the estimator is neither a plain value nor an array")
    version = params.pop("_sklearn_version", None)
    return EstimatorState(found.name.qualname, version if isinstance(version, str) else "", params, arrays)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list, dict)):
        members = [*value, *value.values()] if isinstance(value, dict) else value
        return len(value) <= _MAX_NESTED and all(_is_plain_leaf(member) for member in members)
    return _is_plain_leaf(value)


def _is_plain_leaf(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, float)
