"""A role of the whole deployment: who lost it, and how its holder learns of that."""

from __future__ import annotations

import time
from functools import partial

import pytest
from sqlalchemy import text

from code_worker.store import leases, workers
from code_worker.store.engine import Session, Store
from code_worker.store.leases import RoleLease, RoleLostError

ROLE = "tidying"


def turn(store: Store, owner: str = "one") -> RoleLease:
    return RoleLease(store, ROLE, owner, doing="tidying", wait_s=0)


def lapse(store: Store) -> None:
    """As if its holder had slept for longer than a lease."""
    store.run(lambda session: workers.take_lease(session, ROLE, "one", -1.0))


def held(session: Session) -> str | None:
    owner: str | None = session.scalar(text("SELECT owner FROM leases WHERE name = 'tidying'"))
    return owner


@pytest.mark.parametrize("gives_back", [False, True])
def test_who_slept_while_another_had_the_role_does_not_take_it_again(
    store: Store, gives_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with turn(store) as first:
        lapse(store)
        assert store.run(partial(workers.take_lease, name=ROLE, owner="another", ttl_s=60.0))
        if gives_back:
            store.run(partial(workers.drop_lease, name=ROLE, owner="another"))
        with pytest.raises(RoleLostError, match="another process took over: it is tidying there, or"):
            first.write(lambda _: None)
        monkeypatch.setattr(leases, "LEASE_S", 0.0)
        with pytest.raises(RoleLostError):
            first.check()
        assert store.run(held, write=False) == (None if gives_back else "another")


def test_who_slept_while_nobody_wanted_the_role_has_it_still(store: Store) -> None:
    with turn(store) as first:
        lapse(store)
        assert first.write(held) == "one"
        with pytest.raises(leases.RoleTakenError), turn(store, "another"):
            pass


def test_a_holder_whose_machine_slept_asks_before_it_goes_on(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with turn(sqlite_store) as first:
        stopped = time.monotonic()
        # This clock stands still while a machine sleeps.
        monkeypatch.setattr(time, "monotonic", lambda: stopped)
        sqlite_store.run(partial(workers.drop_lease, name=ROLE, owner="one"))
        monkeypatch.setattr(leases, "LEASE_S", 0.0)
        with pytest.raises(RoleLostError):
            first.check()


def test_what_was_done_is_done_though_the_role_cannot_be_given_back(
    sqlite_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    refuse = "CREATE TRIGGER stuck BEFORE DELETE ON leases BEGIN SELECT RAISE(ABORT, 'stuck'); END"
    with turn(sqlite_store) as first:
        first.write(lambda session: session.execute(text(refuse)))
    assert sqlite_store.run(held, write=False) == "one"
    assert "role_not_given_back" in caplog.text
