"""A count of one is followed by one thing, in every message of a command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import code_worker.cli
from code_worker.cli.common.records import explain
from code_worker.types import ImageFacts, Outcome, RejectReason, Verdict

THINGS = (
    "bytes|copies|crops|days|entries|files|groups|heads|hours|images|jobs|labels|lines|people|plugins|policies"
    "|records|rows|runs|scores|shards|statements|tasks|verdicts|workers"
)
COUNTED = re.compile(rf" (?:[a-z]+ )?(?:{THINGS})\b(?!/s| with another one)")
PACKAGE = Path(str(code_worker.cli.__file__)).parent


def counted(source: str) -> Iterator[str]:
    """What follows a value in an f-string and names several things; `plural` puts both into one value."""
    for text in ast.walk(ast.parse(source)):
        if isinstance(text, ast.JoinedStr):
            for before, after in zip(text.values, text.values[1:], strict=False):
                if isinstance(before, ast.FormattedValue) and isinstance(after, ast.Constant):
                    yield str(after.value)


@pytest.mark.parametrize("name", sorted({path.name for path in PACKAGE.glob("*.py")}))
def test_no_message_names_several_things_after_any_count(name: str) -> None:
    source = (PACKAGE / name).read_text(encoding="utf-8")
    assert [text for text in counted(source) if COUNTED.match(text)] == []


def test_one_byte_is_a_byte() -> None:
    facts = ImageFacts("ab" * 32, 1, format="jpeg", width=1, height=1, mode="L")
    verdict = Verdict("id", "s3://b/a.jpg", Outcome.REJECTED, reason=RejectReason.NOT_FOUND, detail="x", facts=facts)
    assert "1 byte," in str(explain(verdict))
