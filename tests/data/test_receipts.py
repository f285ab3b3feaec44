"""Receipts and the audit count what was done, though answers to commits are lost and transactions done again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from code_worker.data.erasure.erase import Eraser
from code_worker.store import audit
from code_worker.store.engine import Session, Store, T
from code_worker.store.erasure.scopes import Scope
from code_worker.training import snapshot as snapshots
from code_worker.worker.intake import dead_letter
from code_worker.worker.judging.rescore_run import _record as record_rescoring
from tests.data.test_erasure_races import Place


class Unheard(Store):
    """A database whose every answer to a commit is lost once: what was committed is done again."""

    def run(self, work: Callable[[Session], T], *, write: bool = True) -> T:
        if write:
            super().run(work)
        return super().run(work, write=write)


@pytest.mark.parametrize("kind", [Store, Unheard])
def test_each_thing_is_counted_and_said_once(sqlite_store: Store, tmp_path: Path, kind: type[Store]) -> None:
    place = Place(tmp_path, sqlite_store)
    ids = [place.job(place.image(f"{number}.png", number)) for number in range(3)]
    other = place.job(place.image("same.png", 0), "other")
    place.judge(*ids, other)
    for job_id in ids:
        place.labeller.label(job_id, "fake", by="rob")
    place.labeller.label(str(place.root / "0.png"), "real", by="rosa")
    dead_letter(sqlite_store, {"v": 1, "items": [{"uri": "s3://b/n.png", "tenant": "acme", "bogus": 1}]}, "unknown")
    taken = sqlite_store.run(lambda session: snapshots.take(session, place.settings.labels), write=False)
    sqlite_store.run(lambda session: snapshots.freeze(session, taken))
    store = kind(sqlite_store.engine)
    receipt = Eraser(place.settings, store).erase(Scope(tenant="acme"), by="olga")
    assert {name: count for name, count in receipt.counts.items() if count} == {
        "jobs": 3,
        "verdicts": 3,
        "labels": 2,
        "kept_images": 2,
        "embeddings": 2,
        "images": 2,
        "images_shared": 1,
        "copies": 2,
        "addresses": 1,
        "dead_letters": 1,
        "snapshots": 1,
    }
    entries = sqlite_store.run(lambda session: audit.list_entries(session, audit.AuditFilter(), limit=99))
    said = Counter(entry.action for entry in entries if entry.action.startswith("erasure."))
    # Of its jobs, of the address in what was said of shared bytes, and of its images.
    assert said == {"erasure.begin": 1, "erasure.remove": 3, "erasure.snapshot": 1, "erasure.done": 1}


def test_the_audit_says_once_that_history_is_judged_again(sqlite_store: Store) -> None:
    for _ in range(2):
        record_rescoring(Unheard(sqlite_store.engine), "olga", "r-1", {"tenant": "acme"})
    entries = sqlite_store.run(lambda session: audit.list_entries(session, audit.AuditFilter(), limit=99))
    assert [entry.action for entry in entries] == ["verdict.rescore"] * 2
