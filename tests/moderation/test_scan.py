"""Scanning many images: in order, in bounded memory, with what may pass tried again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from code_worker.errors import SourceCredentialsError, TransientError, UnknownHeadError
from code_worker.moderation import scan as scanning
from code_worker.moderation.judge import Judge
from code_worker.moderation.policy import Policy, PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.scan import ScanOptions, scan
from code_worker.settings import LimitSettings
from code_worker.types import Fetched, Label, Outcome, RejectReason, Verdict
from tests.moderation.doubles import DictSources, png, runtime


class RecoveringSources(DictSources):
    """Fails a URI as often as its name ends in, then gives its bytes."""

    def fetch(self, uri: str) -> Fetched:
        found = super().fetch(uri)
        if Counter(self.fetched)[uri] <= int(uri[-1]):
            raise TransientError(RejectReason.FETCH_TIMEOUT, "5 s")
        return found


@pytest.fixture
def pool() -> Iterator[PriorityPool]:
    with PriorityPool(4) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "WAITS_S", (0.0, 0.0))


def judge(sources: DictSources, pool: PriorityPool) -> Judge:
    return Judge(sources=sources, pool=pool, limits=LimitSettings())


def scanned(sources: DictSources, pool: PriorityPool, uris: Iterable[str], **options: Any) -> list[Verdict]:
    return list(scan(uris, judge(sources, pool), runtime(), PolicyBook(), ScanOptions(**options)))


@pytest.mark.parametrize(("batch", "ahead"), [(64, 3), (7, 1), (1, 5)])
def test_verdicts_come_in_the_order_of_the_uris(pool: PriorityPool, batch: int, ahead: int) -> None:
    sources = DictSources({f"u{number}": png(number) for number in range(150)})
    found = scanned(sources, pool, sources.objects, batch=batch, ahead=ahead)
    assert [verdict.uri for verdict in found] == list(sources.objects)
    assert [round((verdict.score or 0) * 255) for verdict in found] == list(range(150))


def test_one_uri_twice_gets_two_verdicts(pool: PriorityPool) -> None:
    found = scanned(DictSources({"a": png(9)}), pool, ["a", "a", "a"], batch=2)
    assert [(verdict.uri, verdict.score) for verdict in found] == [("a", pytest.approx(9 / 255))] * 3


def test_uris_are_read_only_a_few_batches_ahead(pool: PriorityPool) -> None:
    read: list[str] = []

    def uris() -> Iterator[str]:
        for _ in range(1000):
            read.append("a")
            yield "a"

    verdicts = scan(uris(), judge(DictSources({"a": png(1)}), pool), runtime(), PolicyBook(), ScanOptions(batch=10))
    next(verdicts)
    assert len(read) == 30
    verdicts.close()  # type: ignore[attr-defined]
    assert len(read) == 30


def test_what_may_pass_is_tried_three_times_in_all(pool: PriorityPool) -> None:
    sources = RecoveringSources({f"fails-{times}": png(200) for times in range(4)})
    found = scanned(sources, pool, sources.objects)
    assert [verdict.outcome for verdict in found] == [Outcome.JUDGED] * 3 + [Outcome.REJECTED]
    assert found[3].reason is RejectReason.FETCH_TIMEOUT
    assert found[3].detail == "5 s (another try may succeed)"
    assert found[3].provenance.release == "r-test"
    assert Counter(sources.fetched) == {"fails-0": 1, "fails-1": 2, "fails-2": 3, "fails-3": 3}


def test_broken_credentials_are_not_tried_again(pool: PriorityPool) -> None:
    sources = DictSources({"a": SourceCredentialsError("s3://b", "expired"), "b": png(1)})
    found = scanned(sources, pool, sources.objects)
    assert [verdict.reason for verdict in found] == [RejectReason.FETCH_FAILED, None]
    assert sources.fetched.count("a") == 1


def test_an_unknown_head_is_refused_before_anything_is_fetched(pool: PriorityPool) -> None:
    sources = DictSources({"a": png(1)})
    with pytest.raises(UnknownHeadError, match="'crystal-ball'"):
        scan(["a"], judge(sources, pool), runtime(), PolicyBook(), ScanOptions(head="crystal-ball"))
    assert sources.fetched == []


def test_tenant_and_content_type_choose_the_policy(pool: PriorityPool) -> None:
    book = PolicyBook([Policy("strict", 0.1, 0.2, tenant="acme", content_type="avatar")])
    sources = DictSources({"a": png(64)})
    options = ScanOptions(tenant="acme", content_type="avatar")
    (verdict,) = scan(["a"], judge(sources, pool), runtime(), book, options)
    assert (verdict.label, verdict.provenance.policy) == (Label.FAKE, "strict")


def test_a_bug_ends_the_scan(pool: PriorityPool) -> None:
    class BrokenJudge(Judge):
        def judge(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("a bug")

    broken = BrokenJudge(sources=DictSources({}), pool=pool, limits=LimitSettings())
    with pytest.raises(AssertionError, match="a bug"):
        list(scan(["a"], broken, runtime(), PolicyBook()))
