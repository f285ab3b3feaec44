"""The conformance kit: what every head must do so that verdicts can stand on it."""

from __future__ import annotations

import inspect
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import IO, Any, Final, Literal, get_args, get_origin

from pydantic import ValidationError

from code_worker.errors import ArtifactError
from code_worker.heads import Head, HeadSpec, fit_head, options_problem
from code_worker.system.processes import raise_if_stop
from code_worker.testing.score_checks import BASIC_CHECKS, SCORE_CHECKS, check_fit, check_other_processor
from code_worker.testing.trial import HeadUnderTest, NotConformingError, largest_difference, raised

_PICKLE_SUFFIXES: Final = frozenset({".pkl", ".pickle", ".joblib", ".sav", ".pt", ".pth"})
_PICKLE_STARTS: Final = tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))


def check_save_and_load(subject: HeadUnderTest) -> None:
    """Checks that what `load` gives scores bit by bit as the head that was saved."""
    directory = subject.saved("reload")
    if not any(path.is_file() for path in directory.rglob("*")):
        raise NotConformingError("save writes files", "an empty directory", "write the fitted state in save")
    loaded = load_again(subject, directory, subject.head)
    before, after = subject.head.score(subject.embeddings), loaded.score(subject.embeddings)
    if before.tobytes() != after.tobytes():
        raise NotConformingError(
            "bit-identical scores after save and load",
            f"a difference of {largest_difference(before, after):.2g}",
            "save every array in the dtype that score computes with; do not round",
        )


def load_again(subject: HeadUnderTest, directory: Path, head: Head) -> Head:
    """Returns what the class loads from a directory that `head` was saved into, with its options."""
    # Statically, since an access through the class would bind it, and hide whether it is a classmethod.
    if isinstance(inspect.getattr_static(subject.head_class, "load"), FunctionType):
        raise NotConformingError(
            "load is a classmethod", "a method of a head that there is not yet", "write @classmethod above load"
        )
    loaded: object = subject.head_class.load(directory, head.options.model_dump(mode="json"))
    if not isinstance(loaded, subject.head_class):
        raise NotConformingError("load returns a head", type(loaded).__name__, "end load with `return head`")
    return loaded


def check_missing_files(subject: HeadUnderTest) -> None:
    """`load` raises ArtifactError when the files are not there."""
    empty = subject.directory / "empty"
    empty.mkdir()
    try:
        subject.head_class.load(empty)
    except ArtifactError:
        return
    except Exception as error:  # noqa: BLE001 - anything else it raises is what this check is about
        seen = type(error).__name__
    else:
        seen = "a head out of nothing"
    raise NotConformingError(
        "ArtifactError from load of an empty directory",
        seen,
        "raise code_worker.errors.ArtifactError from the OSError",
    )


def check_no_pickles(subject: HeadUnderTest) -> None:
    """Saved files need no unpickling: a pickle runs anything it contains."""
    for path in sorted(subject.saved("scan").rglob("*")):
        for reason in _pickle_signs(path):
            raise NotConformingError(
                "files in plain forms (safetensors, npz without objects, JSON)",
                f"{path.name}: {reason}",
                "save arrays and numbers, and rebuild the head from them in load",
            )


def _pickle_signs(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        yield from _signs_of_content(path.name, file)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    for sign in _signs_of_content(member, file):
                        yield f"{sign} inside: {member}"


def _signs_of_content(name: str, file: IO[bytes]) -> Iterator[str]:
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        yield f"a name that ends in {suffix}"
    start = file.read(2)
    if start in _PICKLE_STARTS:
        yield "content that begins as a pickle"
    # numpy writes arrays of objects as pickles; the dtype stands in the file's header.
    if suffix == ".npy" and b"'|O'" in file.read(256):
        yield "an array of Python objects"


FILE_CHECKS: Final = (check_save_and_load, check_missing_files, check_no_pickles)


def check_creation(subject: HeadUnderTest) -> None:
    """A head is made of a mapping of its options, and of none: then each has a default."""
    options: object = subject.head_class.Options
    if not (isinstance(options, type) and issubclass(options, Head.Options)):
        raise NotConformingError(
            "Options that are derived from Head.Options",
            f"{subject.head_class.__qualname__}.Options is not",
            "write `class Options(Head.Options):` in the head's class, and its options as fields with defaults",
        )
    _make(subject, {}, "give every field of Options a default: a refit that is told nothing makes the head of none")
    _make(subject, subject.options, "give values that the fields of Options take")


def _make(subject: HeadUnderTest, options: Mapping[str, Any], fix: str) -> None:
    try:
        made: object = getattr(subject.head_class(options), "options", None)
    except ValidationError as error:
        raise NotConformingError(f"a head of the options {dict(options)}", options_problem(error), fix) from None
    except (Exception, SystemExit) as error:
        raise_if_stop(error)
        raise NotConformingError(
            "__init__ makes a head of a mapping of its options",
            f"in __init__: {raised(error, subject.head_class)}",
            "write no __init__, or one that takes `options=None` alone and calls super().__init__(options)",
        ) from error
    if not isinstance(made, subject.head_class.Options):
        raise NotConformingError(
            "a head with its options as `self.options`",
            f"{type(made).__name__} after __init__",
            "call super().__init__(options) in __init__",
        )


def check_options_after_load(subject: HeadUnderTest) -> None:
    """`load` keeps the options that it is given: tried with one that is not the default, where one can be derived."""
    for number, changed in enumerate(_other_options(subject)):
        directory = subject.directory / f"options-{number}"
        directory.mkdir()
        try:
            head = fit_head(subject.head_class(changed), subject.train, subject.train_labels)
            head.save(directory)
            before = head.score(subject.embeddings)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - nobody said that the head must take this value
            raise_if_stop(error)
            continue
        loaded = load_again(subject, directory, head)
        after = loaded.score(subject.embeddings)
        if loaded.options != head.options or before.tobytes() != after.tobytes():
            raise NotConformingError(
                f"the same head after load, with the options {changed}",
                f"options {loaded.options.model_dump(mode='json')}, and scores up to "
                f"{largest_difference(before, after):.2g} apart",
                "begin load with `head = cls(options)`, and save what depends on them",
            )
        return


def _other_options(subject: HeadUnderTest) -> Iterator[dict[str, Any]]:
    """The options with one of them changed, of those that the fields take."""
    model, now = subject.head_class.Options, subject.head.options
    for name, field in model.model_fields.items():
        value = getattr(now, name)
        for candidate in _candidates(field.annotation, value):
            changed = {**subject.options, name: candidate}
            try:
                differs = model.model_validate(changed) != now
            except ValidationError:
                continue
            if differs:
                yield changed


def _candidates(annotation: Any, value: object) -> Iterator[object]:
    """Values near the present one, of the types that can be counted or listed."""
    if get_origin(annotation) is Literal:
        yield from (choice for choice in get_args(annotation) if choice != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1)
    elif isinstance(value, float):
        yield from (value * 2, value / 2, value + 0.25)


OPTION_CHECKS: Final = (check_options_after_load,)

_CHECKS: Final = (check_fit, *SCORE_CHECKS, *FILE_CHECKS, *OPTION_CHECKS)
_COPY: Final = "work on a copy: `x = x - mean`, not `x -= mean`, and for torch `torch.from_numpy(x.copy())`"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of one head.

    Attributes:
        name: of the check.
        passed: whether the head keeps the rule.
        expected: what the rule wants; this and the next two are empty when it passed.
        seen: what the head did.
        fix: how to mend it.
        warning: what to look at although it passed.
        left_out: how many checks were not run, since they rest on this one, which failed.
    """

    name: str
    passed: bool
    expected: str = ""
    seen: str = ""
    fix: str = ""
    warning: str = ""
    left_out: int = 0

    def __str__(self) -> str:
        if self.passed:
            return f"{self.name}: passed{f'; warning: {self.warning}' if self.warning else ''}"
        rest = f"; {self.left_out} other checks rest on this one and were not run" if self.left_out else ""
        return f"{self.name}: expected {self.expected}; seen: {self.seen}; fix: {self.fix}{rest}"


def check_head(head: HeadSpec | type[Head], options: Mapping[str, Any] | None = None) -> list[CheckResult]:
    """Runs every check on a head's class with these options; see `each_check`."""
    return list(each_check(head, options))


def each_check(head: HeadSpec | type[Head], options: Mapping[str, Any] | None = None) -> Iterator[CheckResult]:
    """Runs the checks on a head's class with these options, and yields each result as it is there.

    What other checks rest on ends them when it fails: a head that cannot be fitted, or whose scores are no scores.

    Raises:
        PluginError: the spec's target cannot be imported.
    """
    head_class = head.head_class() if isinstance(head, HeadSpec) else head
    with tempfile.TemporaryDirectory(prefix="code_worker_check_") as directory:
        subject = HeadUnderTest(head_class, options or {}, Path(directory))
        checks, whole = (check_creation, *_CHECKS), True
        for number, check in enumerate(checks, 1):
            result = _run(check, subject)
            whole = whole and result.passed
            if not result.passed and check in {check_creation, *BASIC_CHECKS}:
                yield replace(result, left_out=1 + len(checks) - number)
                return
            yield result
        if whole:
            # Another process has to load the head: of one that breaks a rule it would say nothing new.
            yield _run(check_other_processor, subject)


def assert_head_conforms(head: HeadSpec | type[Head], options: Mapping[str, Any] | None = None) -> None:
    """Raises AssertionError that lists each failed check with what was expected, what was seen, and how to fix it.

    What a check warns of is a UserWarning.
    """
    results = check_head(head, options)
    for result in results:
        if result.warning:
            warnings.warn(str(result), stacklevel=2)
    if failed := [str(result) for result in results if not result.passed]:
        raise AssertionError("\n".join([f"{len(failed)} checks failed", *failed]))


def _run(check: Callable[[HeadUnderTest], str | None], subject: HeadUnderTest) -> CheckResult:
    name = check.__name__.removeprefix("check_").replace("_", "-")
    try:
        warning = check(subject)
    except NotConformingError as found:
        return CheckResult(name, passed=False, expected=found.expected, seen=found.seen, fix=found.fix)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a head is somebody else's code and may raise anything
        raise_if_stop(error)
        return _failed_by(error, name, subject, rule=(check.__doc__ or "").strip())
    return CheckResult(name, passed=True, warning=warning or "")


def _failed_by(error: BaseException, name: str, subject: HeadUnderTest, *, rule: str) -> CheckResult:
    seen = raised(error, subject.head_class)
    if isinstance(error, ValueError) and "read-only" in str(error):
        expected, fix = "embeddings and labels that are left as they were: other heads use the same arrays", _COPY
    else:
        expected, fix = "no exception", f"mend what raises it; the rule: {rule}"
    return CheckResult(name, passed=False, expected=expected, seen=seen, fix=fix)
