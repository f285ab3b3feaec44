"""The shared part of the built-in heads: checked input, scores that keep their side of 0.5, and plain files."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from code_worker.errors import ArtifactError
from code_worker.heads import EstimatorState, Head
from code_worker.types import EMBEDDING_DIM

Arrays = dict[str, NDArray[Any]]
_HALF: Final = np.float32(0.5)
_BELOW_HALF: Final = np.nextafter(_HALF, np.float32(0))


def checked_embeddings(embeddings: NDArray[Any]) -> NDArray[Any]:
    """The same embeddings, known to be `(n, 192)`, floating-point, finite and C-contiguous.

    Raises:
        ValueError: they are not.
    """
    refuse_other_forms(embeddings)
    if not np.isfinite(embeddings).all():
        raise ValueError("embeddings must be finite; at least one is NaN or infinite")
    return np.ascontiguousarray(embeddings)


def refuse_other_forms(embeddings: NDArray[Any]) -> None:
    """Refuses what is not `(n, 192)` and floating-point.

    Raises:
        ValueError: it is not.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != EMBEDDING_DIM:
        raise ValueError(f"embeddings must have shape (n, {EMBEDDING_DIM}), not {embeddings.shape}")
    if embeddings.dtype.char not in "fd":
        raise ValueError(f"embeddings must be float32, not {embeddings.dtype}")


def checked_labels(labels: NDArray[Any], rows: int) -> NDArray[np.int8]:
    """Labels as `(rows,) int8`, each 0 (real) or 1 (generated).

    Raises:
        ValueError: another shape or other values.
    """
    if labels.shape != (rows,):
        raise ValueError(f"labels must have shape ({rows},) to go with the embeddings, not {labels.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (real) or 1 (generated)")
    return labels.astype(np.int8)


def two_classes(labels: NDArray[np.int8]) -> NDArray[np.int8]:
    """The same labels, known to hold both classes.

    Raises:
        ValueError: real or generated images are missing.
    """
    if labels.min(initial=1) == labels.max(initial=0):
        raise ValueError("this head needs both real (0) and generated (1) images to be fitted")
    return labels


def sided(scores: NDArray[np.float64], generated: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Scores as `(n,) float32`, at least 0.5 exactly where `generated`: rounding to float32 must not change sides."""
    rounded = scores.astype(np.float32)
    strayed = (rounded >= _HALF) != generated
    if strayed.any():
        rounded[strayed] = np.where(generated[strayed], _HALF, _BELOW_HALF)
    return rounded


def number_array(estimator: EstimatorState, name: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """A copy of an estimator's array in native byte order, known to be finite and of this shape (None: any length).

    Raises:
        ArtifactError: it is missing or differs.
    """
    array = estimator.arrays.get(name)
    if array is None:
        raise ArtifactError(f"{estimator.class_name} has no array {name!r}: was it fitted?")
    return _checked_array(array, name, shape).astype(array.dtype.newbyteorder("="), order="C")


def _checked_array(array: NDArray[Any], name: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    same = len(array.shape) == len(shape) and all(
        expected in (None, found) for expected, found in zip(shape, array.shape, strict=True)
    )
    if not same:
        raise ArtifactError(f"array {name!r} must have shape {shape}, not {array.shape}")
    if not np.isfinite(array).all():
        raise ArtifactError(f"array {name!r} holds values that are not finite")
    return array


def _read_arrays(path: Path) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


class ArrayHead(Head):
    """A head whose fitted state is a few arrays: `head.safetensors` and `head.json` beside it."""

    layout: ClassVar[Mapping[str, tuple[tuple[str, ...], tuple[int | None, ...]]]]
    """Per array the dtypes and the shape (None: any length) that a saved file may have."""
    kind: ClassVar[str]

    tolerance: ClassVar = 2.0**-24
    """Scores are computed in float64, whose rounding on another processor shows where a score lies between two
    float32 numbers: they are at most 2⁻²⁴ apart."""

    @abstractmethod
    def state(self) -> Arrays:
        """The fitted arrays."""

    @abstractmethod
    def restore(self, arrays: Arrays) -> Self:
        """Takes arrays that match `layout`; returns self.

        Raises:
            ArtifactError: they contradict one another.
        """

    def save(self, directory: Path) -> None:
        """Writes `head.safetensors` and `head.json`; the same state gives the same bytes."""
        from safetensors.numpy import save_file

        save_file(self.state(), directory / "head.safetensors")
        description = {"kind": self.kind, "version": 1, "options": self.options.model_dump(mode="json")}
        (directory / "head.json").write_text(
            json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Self:
        """Reads what `save` wrote; `options` override the saved ones.

        Raises:
            ArtifactError: files that are missing, damaged or another head's.
        """
        head = cls._from_description(directory / "head.json", options or {})
        arrays = _read_arrays(directory / "head.safetensors")
        if set(arrays) != set(cls.layout):
            raise ArtifactError(f"{directory}: arrays {sorted(arrays)} where {sorted(cls.layout)} are expected")
        for name, (dtypes, shape) in cls.layout.items():
            if arrays[name].dtype.name not in dtypes:
                raise ArtifactError(f"{directory}: array {name!r} is {arrays[name].dtype}, not {' or '.join(dtypes)}")
            _checked_array(arrays[name], name, shape)
        return head.restore(arrays)

    @classmethod
    def with_options_of(cls, estimator: EstimatorState) -> Self:
        """An unfitted head with the estimator's hyper-parameters, as far as `Options` has fields for them.

        Raises:
            ArtifactError: a value that this head cannot represent.
        """
        names = cls.Options.model_fields.keys() & estimator.params.keys()
        try:
            return cls({name: estimator.params[name] for name in names})
        except ValidationError as error:
            raise ArtifactError(f"{estimator.class_name} has settings that cannot be represented: {error}") from error

    @classmethod
    def _from_description(cls, path: Path, options: Mapping[str, Any]) -> Self:
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        if not isinstance(description, dict) or (description.get("kind"), description.get("version")) != (
            cls.kind,
            1,
        ):
            raise ArtifactError(f"{path} is not the description of a {cls.kind!r} head, version 1")
        try:
            return cls({**description.get("options", {}), **options})
        except (TypeError, ValidationError) as error:
            raise ArtifactError(f"{path}: wrong options: {error}") from error
