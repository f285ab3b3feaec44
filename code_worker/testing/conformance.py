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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from code_worker.heads import Head, HeadSpec
from code_worker.stops import raise_if_stop
from code_worker.testing.files import FILE_CHECKS
from code_worker.testing.scoring import SCORE_CHECKS, check_fit, check_other_processor
from code_worker.testing.subject import NotConformingError, Subject, sample_embeddings

__all__ = ["CheckResult", "assert_head_conforms", "check_head", "sample_embeddings"]


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
    """

    name: str
    passed: bool
    expected: str = ""
    seen: str = ""
    fix: str = ""
    warning: str = ""

    def __str__(self) -> str:
        if self.passed:
            return f"{self.name}: passed{f'; warning: {self.warning}' if self.warning else ''}"
        return f"{self.name}: expected {self.expected}; seen: {self.seen}; fix: {self.fix}"


def check_head(head: HeadSpec | type[Head], options: Mapping[str, Any] | None = None) -> list[CheckResult]:
    """Runs every check on a head's class with these options; stops after the first if it cannot even be fitted.

    Raises:
        PluginError: the spec's target cannot be imported.
    """
    head_class = head.head_class() if isinstance(head, HeadSpec) else head
    with tempfile.TemporaryDirectory(prefix="code_worker_check_") as directory:
        subject = Subject(head_class, options or {}, Path(directory))
        first = _run(check_fit, subject)
        if not first.passed:
            return [first]
        results = [first, *(_run(check, subject) for check in (*SCORE_CHECKS, *FILE_CHECKS))]
        if all(result.passed for result in results):
            # Another process has to load the head: of one that breaks a rule it would say nothing new.
            results.append(_run(check_other_processor, subject))
        return results


def assert_head_conforms(head: HeadSpec | type[Head], options: Mapping[str, Any] | None = None) -> None:
    """Raises AssertionError that lists each failed check with what was expected, what was seen, and how to fix it.

    What `check_head` warns of is a UserWarning.
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
        return CheckResult(
            name,
            passed=False,
            expected="no exception",
            seen=f"{type(error).__name__}: {error}",
            fix=(check.__doc__ or "").strip(),
        )
    return CheckResult(name, passed=True, warning=warning or "")
