"""The conformance kit: what every head must do so that verdicts can stand on it.

In a plugin's own tests:

    from code_worker.testing import assert_head_conforms

    def test_my_head_conforms() -> None:
        assert_head_conforms(MyHead)

`code-worker plugins check NAME` runs the same checks on a head that is installed.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from code_worker.heads import Head, HeadSpec
from code_worker.stops import raise_if_stop
from code_worker.testing.files import FILE_CHECKS
from code_worker.testing.options import OPTION_CHECKS, check_creation
from code_worker.testing.scoring import BASIC_CHECKS, SCORE_CHECKS, check_fit, check_other_processor
from code_worker.testing.subject import NotConformingError, Subject, raised, sample_embeddings

__all__ = ["CheckResult", "assert_head_conforms", "check_head", "each_check", "sample_embeddings"]

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
        subject = Subject(head_class, options or {}, Path(directory))
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


def _run(check: Callable[[Subject], str | None], subject: Subject) -> CheckResult:
    name = check.__name__.removeprefix("check_").replace("_", "-")
    try:
        warning = check(subject)
    except NotConformingError as found:
        return CheckResult(name, passed=False, expected=found.expected, seen=found.seen, fix=found.fix)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a head is somebody else's code and may raise anything
        raise_if_stop(error)
        return _failed_by(error, name, subject, rule=(check.__doc__ or "").strip())
    return CheckResult(name, passed=True, warning=warning or "")


def _failed_by(error: BaseException, name: str, subject: Subject, *, rule: str) -> CheckResult:
    seen = raised(error, subject.head_class)
    if isinstance(error, ValueError) and "read-only" in str(error):
        expected, fix = "embeddings and labels that are left as they were: other heads use the same arrays", _COPY
    else:
        expected, fix = "no exception", f"mend what raises it; the rule: {rule}"
    return CheckResult(name, passed=False, expected=expected, seen=seen, fix=fix)
