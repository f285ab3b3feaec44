"""What the conformance kit says of a head that fails: what failed, where in its code, and a fix that fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pytest
from pydantic import BaseModel, Field

from code_worker.heads import Head
from code_worker.testing import CheckResult, check_head
from tests.plugins.test_conformance_kit import Centroids


class RaisesInFit(Centroids):
    def fit(self, embeddings: Any, labels: Any) -> Self:
        raise KeyError("two\nlines")


class RaisesInItsConstructor(Centroids):
    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        raise LookupError("no licence")


class TakesKeywords(Centroids):
    def __init__(self, *, k: int = 5) -> None:
        super().__init__({})


class ForgetsItsOptions(Centroids):
    def __init__(self, options: Any = None) -> None:
        pass


class LacksDefault(Centroids):
    class Options(Head.Options):
        k: int


class StrangeOptions(Centroids):
    class Options(BaseModel):
        k: int = 5


class DefaultOfAnotherType(Centroids):
    class Options(Head.Options):
        k: int = "five"  # type: ignore[assignment]


class LoadsNothing(Centroids):
    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Any:
        super().load(directory, options)


class LoadsByAHead(Centroids):
    def load(self, directory: Path, options: Mapping[str, Any] | None = None) -> Any:  # type: ignore[override]
        return self


class CentresItsInput(Centroids):
    def score(self, embeddings: Any) -> Any:
        embeddings -= embeddings.mean()
        return super().score(embeddings)


class DividesByZero(Centroids):
    def score(self, embeddings: Any) -> Any:
        return np.full(len(embeddings), np.nan, np.float32)


class NegativeTolerance(Centroids):
    tolerance = -1.0


def place(method: Any, line: int = 1) -> str:
    """This file, and a line of a method, its `def` being 0."""
    return f"{Path(__file__).name}:{method.__code__.co_firstlineno + line}"


FOUND: list[tuple[type[Head], str, str, str]] = [
    (RaisesInFit, "fit", f"KeyError: 'two\\nlines' ({place(RaisesInFit.fit)} in fit)", "mend what raises it"),
    (
        RaisesInItsConstructor,
        "creation",
        f"in __init__: LookupError: no licence ({place(RaisesInItsConstructor.__init__, 2)} in __init__)",
        "write no __init__",
    ),
    (TakesKeywords, "creation", "in __init__: TypeError: ", "takes `options=None` alone"),
    (ForgetsItsOptions, "creation", "NoneType after __init__", "call super().__init__(options)"),
    (LacksDefault, "creation", "k: Field required", "a default"),
    (StrangeOptions, "creation", "StrangeOptions.Options is not", "class Options(Head.Options):"),
    (DefaultOfAnotherType, "options", "k: Input should be a valid integer", "a default of its own type"),
    (LoadsNothing, "save-and-load", "NoneType", "end load with `return head`"),
    (LoadsByAHead, "save-and-load", "a method of a head", "@classmethod"),
    (CentresItsInput, "shape-and-dtype", f"read-only ({place(CentresItsInput.score)} in score)", "`x = x - mean`"),
    (DividesByZero, "range", "97 of 97 scores are NaN or infinite", "a division by zero"),
    (NegativeTolerance, "tolerance", "-1.0", "declare no more than rounding can do"),
]


def first_failure(head_class: type[Head], options: Mapping[str, Any] | None = None) -> CheckResult:
    return next(result for result in check_head(head_class, options) if not result.passed)


@pytest.mark.parametrize(("head_class", "check", "seen", "fix"), FOUND, ids=[row[0].__name__ for row in FOUND])
def test_a_failure_says_what_failed_and_how_to_mend_it(
    head_class: type[Head], check: str, seen: str, fix: str
) -> None:
    found = first_failure(head_class)
    assert found.name == check
    assert seen in found.seen
    assert fix in found.fix
    assert "\n" not in str(found)


def test_wrong_options_are_one_line() -> None:
    found = first_failure(KeepsOptions, {"k": "many", "strength": -1})
    assert found.name == "creation"
    assert found.seen.startswith("k: Input should be a valid integer, unable to parse")
    assert "; strength: Input should be greater than 0" in found.seen


class KeepsOptions(Centroids):
    class Options(Head.Options):
        k: int = Field(5, ge=1, le=5)
        strength: float = Field(1.0, gt=0, le=1)
        careful: bool = False
        metric: Literal["cosine", "dot"] = "cosine"


@pytest.mark.parametrize("named", [{"k"}, {"strength"}, {"careful"}, {"metric"}])
def test_an_option_that_load_drops_is_found_by_a_value_that_its_field_takes(named: set[str]) -> None:
    class Drops(Centroids):
        Options = type(  # type: ignore[assignment]
            "Options",
            (Head.Options,),
            {
                "__annotations__": {
                    name: field.annotation
                    for name, field in KeepsOptions.Options.model_fields.items()
                    if name in named
                },
                **{name: field for name, field in KeepsOptions.Options.model_fields.items() if name in named},
            },
        )

        @classmethod
        def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Self:
            return super().load(directory)

    found = first_failure(Drops)
    assert found.name == "options-after-load"
    assert f"with the options {{'{named.copy().pop()}': " in found.expected
    assert "head = cls(options)" in found.fix


def test_options_that_are_kept_pass_and_values_that_the_head_refuses_are_passed_over() -> None:
    class Refuses(KeepsOptions):
        def fit(self, embeddings: Any, labels: Any) -> Self:
            if self.options != self.Options():
                raise ValueError("only the defaults")
            return super().fit(embeddings, labels)

    for head_class in (KeepsOptions, Refuses):
        assert [str(result) for result in check_head(head_class) if not result.passed] == []
