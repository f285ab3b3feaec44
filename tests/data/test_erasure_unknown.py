"""Erasures of what nobody knows, of what was erased before, and of what only a message or a copy names."""

from __future__ import annotations

from pathlib import Path

import pytest

from code_worker.data.erasure.erase import Eraser
from code_worker.data.kept_copies import open_kept
from code_worker.errors import StoreError
from code_worker.settings import Settings
from code_worker.store import workers
from code_worker.store.engine import Store
from code_worker.store.erasure import receipts
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import uuid7
from code_worker.worker.intake import dead_letter
from tests.data.test_erasure import erase, judge
from tests.store.acts import accept, claim, judged, write
from tests.training.learning import learning_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return learning_settings(tmp_path / "data")


@pytest.mark.parametrize("scope", [{"tenant": "acne"}, {"job": uuid7()}, {"sha256": "b" * 64}])
def test_a_tenant_job_or_image_that_nobody_knows_is_refused(
    sqlite_store: Store, settings: Settings, scope: dict[str, str]
) -> None:
    judge(sqlite_store, "c" * 64, tenant="acme")
    with pytest.raises(StoreError, match=r"nothing is kept of the .*so nothing was erased: is "):
        erase(settings, sqlite_store, **scope)
    with pytest.raises(StoreError, match="nothing is kept"):
        Eraser(settings, sqlite_store).preview(Scope(**scope))
    assert sqlite_store.run(receipts.list_receipts) == []


def test_a_hash_that_nobody_knows_may_be_of_an_image_that_is_being_judged(
    sqlite_store: Store, settings: Settings
) -> None:
    (job_id,) = accept(sqlite_store, "s3://b/a.png")
    claim(sqlite_store, [job_id])
    seen = Eraser(settings, sqlite_store).preview(Scope(sha256="b" * 64))
    assert (seen.jobs, seen.images, seen.labels, seen.copies) == (0, 1, 0, 0)
    receipt = erase(settings, sqlite_store, sha256="b" * 64)
    assert (receipt.state, receipt.counts) == ("done", {"images": 1}), "nothing but what it was asked for"
    write(sqlite_store, judged(job_id))
    with pytest.raises(StoreError, match="nothing is kept"):
        erase(settings, sqlite_store, sha256="e" * 64)


def test_who_asks_for_the_same_again_gets_the_receipt_of_then(sqlite_store: Store, settings: Settings) -> None:
    """A script that lost the answer ends well, and a second receipt would say that somebody else was erased."""
    job_id = judge(sqlite_store, "c" * 64, tenant="acme")
    receipt = erase(settings, sqlite_store, tenant="acme")
    for scope in ({"tenant": "acme"}, {"job": job_id}, {"sha256": "c" * 64}):
        assert erase(settings, sqlite_store, **scope) == receipt
        assert Eraser(settings, sqlite_store).preview(Scope(**scope)).jobs == 0
    judge(sqlite_store, "d" * 64, tenant="acme")
    assert erase(settings, sqlite_store, tenant="acme").id != receipt.id, "what came since is erased"


@pytest.mark.parametrize(
    "scope", [{"tenant": "acne"}, {"job": "0198c5a2-7f31-7abc-9def-0123456789ab"}, {"sha256": "b" * 64}]
)
def test_what_an_unreadable_message_alone_names_is_kept_and_erased(
    sqlite_store: Store, settings: Settings, scope: dict[str, str]
) -> None:
    ((name, value),) = scope.items()
    dead_letter(
        sqlite_store, {"v": 9, "items": [{"uri": "s3://b/a.png", "tenant": "other"}, {name: value}]}, "no form"
    )
    assert erase(settings, sqlite_store, **scope).counts["dead_letters"] == 1
    (letter,) = sqlite_store.run(workers.list_dead_letters)
    assert (value in letter.body, "other" in letter.body) == (False, True)


def test_a_copy_that_no_row_names_is_kept_and_erased(sqlite_store: Store, settings: Settings) -> None:
    kept = open_kept(settings)
    sha256 = kept.put(b"a copy whose labeller died")
    assert erase(settings, sqlite_store, sha256=sha256).state == "done"
    assert not kept.exists(sha256)
