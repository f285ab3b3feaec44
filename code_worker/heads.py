"""The base class of heads, and the description that a plugin hands back for one."""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from code_worker.errors import ConfigurationError, PluginError, nearest
from code_worker.system.processes import raise_if_stop

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Embeddings = NDArray[np.float32]
    Labels = NDArray[np.int8]
    Scores = NDArray[np.float32]

__all__ = [
    "MAX_TOLERANCE",
    "EstimatorState",
    "Head",
    "HeadSpec",
    "compute_device",
    "fit_head",
    "head_spelt",
    "options_problem",
    "read_options",
    "tolerance_of",
    "unknown_head_settings",
    "use_compute_device",
]


MAX_TOLERANCE: Final = 1e-4
"""The most that a head may declare as its `tolerance`: what sums in float32, taken in another order, come to.

A float32 sum of n = 192 products is off by n·u·Σ|wᵢxᵢ| at most, u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, eq. 3.5), and a score by a quarter of what its log-odds are off, the logistic function's steepest
slope. Twice that, for products that add up to 17, at which a float32 score becomes 1, is 9.7e-5.
"""
_device = "cpu"


def compute_device() -> str:
    """Device of this process's encoder, `cpu`, `cuda` or `cuda:N`; a head may put large matrix products there."""
    return _device


def use_compute_device(device: str) -> None:
    """Says where the encoder runs; for anyone who starts it."""
    global _device  # noqa: PLW0603 - a device belongs to the process, and heads are built before the encoder starts
    _device = device


@dataclass(frozen=True, slots=True)
class EstimatorState:
    """A fitted scikit-learn estimator as data: what its file said, and nothing that runs.

    Attributes:
        class_name: e.g. `LogisticRegression`.
        sklearn_version: version that wrote the file; empty when it does not say.
        params: attributes that are plain values (numbers, text, short lists of them).
        arrays: attributes that are arrays, e.g. `coef_`; read-only, in the file's byte order.
    """

    class_name: str
    sklearn_version: str
    params: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Head(ABC):
    """A classifier over embeddings: how real and generated images are told apart.

    Subclass it, fill `fit`, `score`, `save` and `load`, and hand a `HeadSpec` to the hook
    `code_worker_register_heads`. `code-worker plugins check NAME` runs the conformance kit on it.
    """

    class Options(BaseModel):
        """Settings of the head; unknown ones are refused, the values go into the release's manifest."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    one_class: ClassVar[bool] = False
    """Whether `fit` is given real images only (labels all 0)."""

    tolerance: ClassVar[float] = 0.0
    """How far two scores of one embedding by one fitted head may be apart: in another batch, with other threads, on
    another processor or device. Unset: not at all. At most 1e-4, and never across 0.5."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = self.Options.model_validate(dict(options or {}))

    @abstractmethod
    def fit(self, embeddings: Embeddings, labels: Labels) -> Self:
        """Learns from `(n, 192) float32` embeddings and `(n,) int8` labels (0 real, 1 generated); returns self.

        Both arrays are read-only.

        Raises:
            ValueError: fewer rows than the head needs, or a value that is not finite.
        """

    @abstractmethod
    def score(self, embeddings: Embeddings) -> Scores:
        """`(n,) float32` in [0, 1], higher = more likely generated, each row independent of the others.

        0.5 is the head's own border: `score >= 0.5` means it would call the image generated.

        Raises:
            ValueError: an embedding that is not finite or not 192 wide.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes the fitted state into an empty directory, in forms that need no unpickling."""

    @classmethod
    @abstractmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Self:
        """Reads what `save` wrote; scores afterwards are bit-identical.

        Raises:
            ArtifactError: files that are missing or not what `save` writes.
        """

    @classmethod
    def from_estimator(cls, estimator: EstimatorState) -> Self | None:
        """The head that predicts as this published estimator does; None if it is not of a kind this head stands for.

        Raises:
            ArtifactError: it is of that kind, but with settings or arrays that cannot be represented exactly.
        """
        return None


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A head as a plugin offers it; `target` is imported only when the head is used.

    Attributes:
        name: what users write (`--head knn`); lower case letters, digits, `-` and `_`.
        target: `package.module:ClassName`, or the class itself.
        summary: one line for `code-worker heads list`.
    """

    name: str
    target: str | type[Head]
    summary: str = ""

    def head_class(self) -> type[Head]:
        """Imports and returns the class.

        Raises:
            PluginError: the target does not import, or is no subclass of `Head` that can be made.
        """
        if not isinstance(self.target, str):
            found: object = self.target
        else:
            module, _, attribute = self.target.partition(":")
            if not (module and attribute):
                raise PluginError(f"head {self.name!r}: {self.target!r} names no class: `module:Class` is expected")
            try:
                found = getattr(importlib.import_module(module), attribute)
            except (Exception, SystemExit) as error:  # a plugin is somebody else's code and may raise anything at all
                raise_if_stop(error)
                said = f"{type(error).__name__}: {error}"
                raise PluginError(f"head {self.name!r}: cannot import {self.target!r}: {said}") from error
        if not (isinstance(found, type) and issubclass(found, Head)):
            raise PluginError(f"head {self.name!r}: {self.target!r} is not a subclass of code_worker.Head")
        if missing := getattr(found, "__abstractmethods__", None):
            raise PluginError(
                f"head {self.name!r}: {self.target!r} is abstract: it lacks {', '.join(sorted(missing))}"
            )
        return found


def options_problem(error: ValidationError) -> str:
    """Returns what a head's options refuse, in one line: `n_neighbors: Input should be greater than 0`."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'options'}: {one['msg']}" for one in error.errors())


def read_options(
    name: str, head_class: type[Head], written: Mapping[str, Any], below: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All options of a head as plain values, from what a setting or a command gives of them.

    Args:
        name: of the head, for errors.
        head_class: makes the head of its options.
        written: values by option; the case of names does not count, and text may be JSON, as in variables.
        below: options that apply where `written` does not set them.

    Raises:
        ConfigurationError: the head refuses them.
    """
    # Names of variables have no case, and their values are text, of which JSON is the longer form.
    fields = {field.lower(): field for field in getattr(head_class.Options, "model_fields", ())}
    given = {fields.get(key.lower(), key): value for key, value in written.items()}
    problem = ""
    # First as it is: an option that is text may look like JSON, such as `1` or `true`.
    for tried in (given, {key: _from_json(value) for key, value in given.items()}):
        try:
            return head_class({**(below or {}), **tried}).options.model_dump(mode="json")
        except ValidationError as error:
            problem = options_problem(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a head is somebody else's code and may raise anything
            raise_if_stop(error)
            problem = f"{type(error).__name__}: {error}"
    has = ", ".join(sorted(fields.values())) or "none"
    raise ConfigurationError(f"options of head {name!r}: {problem}; it has {has}")


def _from_json(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def head_spelt(name: str, known: Collection[str]) -> str | None:
    """The head of `known` that a name in the settings stands for; names of variables have no `-`."""
    # The exact name first: with `-` for `_` one of two heads could hide the other.
    alike = [one for one in known if name == one] or [one for one in known if name == one.replace("-", "_")]
    return alike[0] if alike else None


def unknown_head_settings(configured: Iterable[str], known: Collection[str]) -> list[str]:
    """A sentence for each head of `CODE_WORKER_HEADS` that is none of `known`, with the one that is spelt alike."""
    found = []
    for name in configured:
        if head_spelt(name, known) is None:
            near = nearest(name, known)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
            where = f"[heads.{name}] or CODE_WORKER_HEADS__{name.upper().replace('-', '_')}__…"
            found.append(f"settings for a head {name!r} ({where}) that no plugin offers; {hint}")
    return found


def tolerance_of(head: Head | type[Head]) -> float:
    """The `tolerance` that a head declares.

    Raises:
        ValueError: it is no number from 0 to `MAX_TOLERANCE`.
    """
    declared: object = head.tolerance
    # Real: numpy's scalars are, and its float32 is no float.
    if not (isinstance(declared, Real) and 0 <= float(declared) <= MAX_TOLERANCE):
        raise ValueError(f"declares a tolerance of {declared!r}; it must be from 0 to {MAX_TOLERANCE:g}")
    return float(declared)


def fit_head(head: Head, embeddings: Embeddings, labels: Labels) -> Head:
    """Fits a head on what it may see, read-only, and a one-class head on the real images alone; returns it.

    Raises:
        ValueError: as `Head.fit`.
    """
    # rows: a (n,) mask of the real ones, or all; seen is (m, 192), known (m,).
    rows = labels == 0 if head.one_class else slice(None)
    seen, known = embeddings[rows], labels[rows]
    # Other heads learn from the same arrays.
    seen.flags.writeable = known.flags.writeable = False
    return head.fit(seen, known)
