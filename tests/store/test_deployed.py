"""Releases, aliases, policies, embeddings: what judges, and how one goes back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from code_worker.errors import StoreError
from code_worker.store import embeddings, policies, releases
from code_worker.store.engine import Session, Store
from tests.patience import polls

VECTOR = bytes(range(256)) * 3


def add(store: Store, release_id: str, *, manifest_sha256: str | None = None) -> bool:
    return store.run(
        lambda session: releases.add(
            session,
            id=release_id,
            manifest_sha256=manifest_sha256 or release_id * 32,
            location=f"releases/{release_id}",
            manifest={"heads": {"linear": {}}, "ü": 1.5},
            source="hf:aimagelab/CoDE",
            by="ann",
        )
    )


def promote(store: Store, release_id: str, *, name: str = "champion") -> str | None:
    return store.run(
        lambda session: releases.move_alias(session, name, release_id, by="alice", reason="better on everything")
    )


def roll_back(store: Store) -> str:
    return store.run(lambda session: releases.rollback(session, "champion", by="bob", reason="worse after all"))


def champion(store: Store) -> str | None:
    return store.run(lambda session: releases.alias(session, "champion"), write=False)


def test_a_release_is_kept_as_it_was_registered(store: Store) -> None:
    assert add(store, "r1")
    found = store.run(lambda session: releases.get(session, "r1"))
    assert found is not None
    assert (found.location, found.source, found.status) == ("releases/r1", "hf:aimagelab/CoDE", "ready")
    assert found.manifest == {"heads": {"linear": {}}, "ü": 1.5}
    assert store.run(lambda session: releases.get(session, "r2")) is None


def test_registering_again_changes_nothing_and_another_manifest_is_refused(store: Store) -> None:
    assert add(store, "r1")
    assert not add(store, "r1")
    with pytest.raises(StoreError, match="release r1 is registered with another manifest"):
        add(store, "r1", manifest_sha256="f" * 64)


def test_releases_are_listed_newest_first(store: Store) -> None:
    for name in ("r1", "r2", "r3"):
        add(store, name)
    assert {release.id for release in store.run(releases.list_releases)} == {"r1", "r2", "r3"}
    assert len(store.run(lambda session: releases.list_releases(session, limit=2))) == 2


def test_an_alias_moves_and_remembers(store: Store) -> None:
    add(store, "r1")
    add(store, "r2")
    assert champion(store) is None
    assert promote(store, "r1") is None
    assert promote(store, "r2") == "r1"
    assert promote(store, "r2") == "r2"
    assert champion(store) == "r2"
    promote(store, "r1", name="challenger")
    assert store.run(releases.aliases) == {"champion": "r2", "challenger": "r1"}
    history = store.run(lambda session: releases.moves(session, "champion"))
    assert [(move.previous_id, move.release_id, move.by) for move in history] == [
        ("r1", "r2", "alice"),
        (None, "r1", "alice"),
    ]


def test_an_alias_does_not_move_to_what_is_not_there(store: Store) -> None:
    with pytest.raises(StoreError, match="no release r9"):
        promote(store, "r9")
    assert champion(store) is None


def test_rolling_back_twice_goes_two_moves_back_and_not_to_and_fro(store: Store) -> None:
    for name in ("r1", "r2", "r3", "r4"):
        add(store, name)
    for name in ("r1", "r2", "r3"):
        promote(store, name)
    assert roll_back(store) == "r2"
    assert roll_back(store) == "r1"
    with pytest.raises(StoreError, match="nothing to roll back to"):
        roll_back(store)
    assert promote(store, "r4") == "r1"
    assert roll_back(store) == "r1"
    with pytest.raises(StoreError, match="nothing to roll back to"):
        roll_back(store)
    assert champion(store) == "r1"
    history = store.run(lambda session: releases.moves(session, "champion"))
    assert [move.undoes is not None for move in history] == [True, False, True, True, False, False, False]


def test_an_alias_that_never_moved_cannot_be_rolled_back(store: Store) -> None:
    with pytest.raises(StoreError, match="nothing to roll back to"):
        roll_back(store)


def test_promoters_at_once_leave_one_unbroken_history(store: Store) -> None:
    names = [f"r{number}" for number in range(8)]
    for name in names:
        add(store, name)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: promote(store, name), names))
    history = store.run(lambda session: releases.moves(session, "champion"))[::-1]
    assert len(history) == 8
    assert history[0].previous_id is None
    assert [move.previous_id for move in history[1:]] == [move.release_id for move in history[:-1]]
    assert champion(store) == history[-1].release_id


def retire(store: Store, release_id: str) -> bool:
    return store.run(lambda session: releases.retire(session, release_id, "its files were deleted"))


@pytest.mark.parametrize("name", ["champion", "challenger"])
def test_what_was_retired_since_it_was_loaded_is_pointed_to_by_nobody(store: Store, name: str) -> None:
    for release in ("r1", "r2"):
        add(store, release)
    promote(store, "r1", name=name)
    assert not retire(store, "r1")
    promote(store, "r2", name=name)
    assert retire(store, "r1")
    with pytest.raises(StoreError, match=f"{name} cannot be r1: its files were deleted"):
        promote(store, "r1", name=name)
    with pytest.raises(StoreError, match=f"{name} cannot be r1"):
        store.run(lambda session: releases.rollback(session, name, by="bob", reason=""))
    assert store.run(lambda session: releases.alias(session, name), write=False) == "r2"


def other_end_waits(store: Store) -> None:
    """Returns when a statement of the other transaction waits for a lock of this one."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    for _ in polls():
        if store.run(lambda session: session.scalar(text(waiting)), write=False):
            return
    raise AssertionError("nobody waits")


@pytest.mark.parametrize("first", ["promote", "retire"])
def test_of_a_promotion_and_a_retirement_at_one_moment_one_wins(postgres_store: Store, first: str) -> None:
    store = postgres_store
    for release in ("r1", "r2"):
        add(store, release)
    promote(store, "r1")
    acts = {
        "promote": lambda session: releases.move_alias(session, "champion", "r2", by="alice", reason=""),
        "retire": lambda session: releases.retire(session, "r2", "its files were deleted"),
    }
    with ThreadPoolExecutor(1) as pool:
        with Session(store.engine) as session, session.begin():
            acts.pop(first)(session)
            ((_, act),) = acts.items()
            other = pool.submit(store.run, act)
            other_end_waits(store)
        if first == "promote":
            assert other.result() is False
        else:
            with pytest.raises(StoreError, match="champion cannot be r2"):
                other.result()
    found = store.run(lambda session: releases.get(session, "r2"), write=False)
    assert found is not None
    assert (champion(store), found.status == "ready") == (("r2", True) if first == "promote" else ("r1", False))


@pytest.mark.parametrize("table", ["alias_moves", "policies"])
def test_history_cannot_be_changed(store: Store, table: str) -> None:
    add(store, "r1")
    promote(store, "r1")
    put(store, low=0.4, high=0.6)
    with pytest.raises(StoreError, match=f"{table} are immutable"):
        store.run(lambda session: session.execute(text(f"UPDATE {table} SET id = id")))


def put(store: Store, *, low: float = 0.4, high: float = 0.6, **more: str | None) -> policies.PolicyRow:
    return store.run(lambda session: policies.put(session, low=low, high=high, by="alice", **more))


def test_the_last_version_of_each_scope_is_in_force(store: Store) -> None:
    put(store, low=0.1, high=0.2)
    put(store, low=0.3, high=0.9)
    put(store, tenant="acme", head="knn", note="stricter")
    put(store, tenant="acme", content_type="avatar")
    rows = store.run(policies.in_force, write=False)
    assert [(row.tenant, row.content_type, row.version, row.low, row.head) for row in rows] == [
        (None, None, 2, 0.3, None),
        ("acme", None, 1, 0.4, "knn"),
        ("acme", "avatar", 1, 0.4, None),
    ]
    versions = store.run(policies.history)
    assert [(row.version, row.high) for row in versions] == [(2, 0.9), (1, 0.2)]
    assert store.run(lambda session: policies.get(session, versions[1].id)) == versions[1]
    assert store.run(lambda session: policies.get(session, "published")) is None


def stale(store: Store, release: str | None) -> list[str | None]:
    return [row.tenant for row in store.run(lambda session: policies.stale(session, release), write=False)]


def test_what_was_calibrated_on_another_release_is_stale(store: Store) -> None:
    put(store)
    put(store, tenant="old", release_id="r1")
    put(store, tenant="new", release_id="r2")
    put(store, tenant="mended", release_id="r1")
    put(store, tenant="mended", release_id="r2")
    assert (stale(store, "r1"), stale(store, "r2")) == (["mended", "new"], ["old"])
    assert stale(store, None) == []


def test_the_same_encoder_and_head_under_another_id_leave_a_policy_fresh(store: Store) -> None:
    def register(release: str, encoder: str, knn: str) -> None:
        heads = {"linear": {"sha256": "a"}, "knn": {"sha256": knn}}
        manifest = {"heads": heads, "default_head": "linear", "encoder": {"sha256": encoder}}
        facts = {"manifest_sha256": release * 32, "location": "", "manifest": manifest, "source": "", "by": "ann"}
        store.run(lambda session: releases.add(session, id=release, **facts))

    for release, encoder, knn in (("r1", "e", "b"), ("r2", "e", "c"), ("r3", "f", "b")):
        register(release, encoder, knn)
    put(store, tenant="knn", head="knn", release_id="r1")
    put(store, tenant="linear", head="linear", release_id="r1")
    put(store, tenant="plain", release_id="r1")
    assert stale(store, "r1") == []
    assert stale(store, "r2") == ["knn"]
    assert stale(store, "r3") == ["knn", "linear", "plain"]


def test_the_evidence_says_the_release_of_what_was_calibrated_before_there_was_a_column(store: Store) -> None:
    store.run(lambda session: policies.put(session, low=0.1, high=0.9, by="ann", evidence={"release": "r1"}))
    (row,) = store.run(policies.in_force, write=False)
    assert row.release_id == "r1"
    assert stale(store, "r2") == [None]


@pytest.mark.parametrize(("low", "high"), [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_thresholds_that_make_no_sense_are_refused(store: Store, low: float, high: float) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        put(store, low=low, high=high)


def test_an_empty_tenant_does_not_pass_for_every_tenant(store: Store) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        put(store, tenant="")


def test_embeddings_are_known_by_encoder_and_content(store: Store) -> None:
    first, second, encoder = "1" * 64, "2" * 64, "e" * 64
    store.run(lambda session: embeddings.keep(session, encoder, {second: VECTOR[::-1], first: VECTOR}))
    known = store.run(lambda session: embeddings.known(session, encoder, [first, second, "3" * 64, first]))
    assert known == {first: VECTOR, second: VECTOR[::-1]}
    assert store.run(lambda session: embeddings.known(session, "f" * 64, [first])) == {}


def test_an_embedding_that_is_kept_already_stays(store: Store) -> None:
    for vector in (VECTOR, VECTOR[::-1]):
        store.run(lambda session, vector=vector: embeddings.keep(session, "e" * 64, {"1" * 64: vector}))
    assert store.run(lambda session: embeddings.known(session, "e" * 64, ["1" * 64])) == {"1" * 64: VECTOR}
    store.run(lambda session: embeddings.keep(session, "e" * 64, {}))


def test_a_vector_of_another_length_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="refused"):
        store.run(lambda session: embeddings.keep(session, "e" * 64, {"1" * 64: b"short"}))
