"""What is audited, each act once, in the transaction that does it; and what never stands in an entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from code_worker.data.label_files.label_import import import_rows
from code_worker.data.label_files.label_rows import Row
from code_worker.errors import StoreError
from code_worker.settings import ScheduleSettings, Settings
from code_worker.store import audit, releases
from code_worker.store.audit import Entry
from code_worker.store.engine import Session, Store, open_store
from code_worker.store.ids import uuid7
from code_worker.store.learning import runs
from code_worker.store.policies import put_policy
from code_worker.worker.judging.node import note_settings
from tests.cli.conftest import Cli
from tests.data.label_acts import Place, sha256_of


def entries(store: Store) -> list[Entry]:
    assert audit.verify(store).flaws == ()
    return store.run(lambda session: audit.list_entries(session, limit=100, newest_first=False), write=False)


def told(store: Store) -> list[tuple[str, str, str]]:
    return [(entry.actor, entry.action, entry.subject) for entry in entries(store)]


def details(entry: Entry) -> dict[str, Any]:
    found = json.loads(entry.details)
    assert isinstance(found, dict)
    return found


def add_release(store: Store, name: str) -> None:
    manifest = {"heads": {"linear": {"sha256": "1" * 64}}}
    store.run(
        lambda session: releases.add(
            session, id=name, manifest_sha256="2" * 64, location="", manifest=manifest, source="hf:a/b", by="olga"
        )
    )


def test_a_release_from_its_import_to_its_rollback(store: Store) -> None:
    add_release(store, "r-1")
    add_release(store, "r-1")
    add_release(store, "r-2")
    store.run(lambda session: releases.move_alias(session, "champion", "r-1", by="olga", reason="first"))
    store.run(lambda session: releases.challenge(session, "r-2", by="olga", reason=""))
    store.run(lambda session: releases.drop_alias(session, "challenger", by="olga", reason="slow"))
    store.run(lambda session: releases.drop_alias(session, "challenger", by="olga"))
    store.run(lambda session: releases.move_alias(session, "champion", "r-2", by="ann", reason="better"))
    store.run(lambda session: releases.move_alias(session, "champion", "r-2", by="bob", reason="nothing moves"))
    store.run(lambda session: releases.rollback(session, "champion", by="ann", reason="worse"))
    assert told(store) == [
        ("olga", "release.add", "r-1"),
        ("olga", "release.add", "r-2"),
        ("olga", "release.promote", "r-1"),
        ("olga", "release.challenge", "r-2"),
        ("olga", "release.withdraw", "r-2"),
        ("ann", "release.promote", "r-2"),
        ("ann", "release.rollback", "r-1"),
    ]
    made = entries(store)
    assert details(made[0]) == {
        "manifest_sha256": "2" * 64,
        "source": "hf:a/b",
        "heads": {"linear": "1" * 64},
    }
    assert details(made[-1]) == {"alias": "champion", "before": "r-2", "reason": "worse"}


def test_a_promotion_that_does_not_happen_leaves_no_entry(store: Store) -> None:
    add_release(store, "r-1")

    def promote_and_fail(session: Session) -> None:
        releases.move_alias(session, "champion", "r-1", by="olga", reason="")
        raise StoreError("the disk went away")

    with pytest.raises(StoreError, match="went away"):
        store.run(promote_and_fail)
    assert [action for _, action, _ in told(store)] == ["release.add"]


def test_thresholds_with_all_that_they_are(store: Store, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    made = put_policy(settings, store, by="olga", low=0.4, high=0.6, tenant="acme", note="see s3://b/secret.jpg")
    (entry,) = entries(store)
    assert (entry.actor, entry.action, entry.subject) == ("olga", "policy.put", made.id)
    assert details(entry) == {
        "tenant": "acme",
        "content_type": "",
        "version": 1,
        "head": None,
        "low": 0.4,
        "high": 0.6,
        "note": "see …",
        "release_id": None,
    }


def test_a_rejected_candidate_with_the_reasons(store: Store) -> None:
    def reject(session: Session) -> None:
        run = runs.start(session, id=uuid7(), kind="refit", by="olga", owner="o", config={}, base_release=None)
        assert run is not None
        runs.note(session, run.lease, candidate="r-9")
        runs.finish(session, run.lease, "rejected", reasons=[f"worse on {'ab' * 32} of s3://b/a.jpg"])
        runs.finish(session, run.lease, "rejected", reasons=["again"])

    store.run(reject)
    (entry,) = entries(store)
    assert (entry.actor, entry.action, entry.subject) == ("olga", "release.reject", "r-9")
    assert details(entry)["reasons"] == ["worse on … of …"]


def test_a_label_names_its_statement_and_never_the_image(store: Store, tmp_path: Path) -> None:
    place = Place(tmp_path, store)
    path = place.image("a.png")
    place.labeller.label(path, "fake", by="lea", generator="sdxl", note=f"the note on {path}")
    place.labeller.label(path, "fake", by="lea", generator="sdxl")
    (entry,) = entries(store)
    (said,) = place.statements()
    assert (entry.actor, entry.action, entry.subject) == ("lea", "label.add", f"label {said.id}")
    assert details(entry) == {"label": "fake", "generator": "sdxl", "by": "lea", "source": "api"}
    written = str(entry)
    assert path not in written
    assert sha256_of(path) not in written


def test_an_imported_file_is_one_entry_with_counts_and_its_hash(store: Store, tmp_path: Path) -> None:
    place = Place(tmp_path, store)
    rows = [
        Row(place=f"line {number}", label="real" if number else "fake", uri=place.image(f"{number}.png", number))
        for number in range(3)
    ]

    def read() -> None:
        list(import_rows(place.labeller, rows, name="a.csv", by="lea", actor="rob", sha256="3" * 64, threads=2))

    read()
    read()
    (entry,) = entries(store)
    assert (entry.actor, entry.action, entry.subject) == ("rob", "label.import", "file a.csv")
    assert details(entry) == {"sha256": "3" * 64, "rows": 3, "added": 3, "real": 2, "fake": 1}
    assert not any(sha256_of(str(path)) in str(entry) for path in place.photos.iterdir())


def test_changed_settings_once_by_whoever_starts_first(store: Store, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    for _ in range(2):
        note_settings(settings, store)
    assert [subject for _, _, subject in told(store)] == [
        f"settings {name}" for name in ("schedule", "gate", "labels", "roles")
    ]
    changed = settings.model_copy(update={"schedule": ScheduleSettings(retrain="0 3 * * sun")})
    for _ in range(2):
        note_settings(changed, store)
    *_, entry = entries(store)
    assert (len(entries(store)), entry.action, entry.subject) == (5, "settings.change", "settings schedule")
    assert details(entry)["retrain"] == "0 3 * * sun"


def test_the_shell_lists_and_verifies(cli: Cli, store: Store) -> None:
    assert cli("audit", "list").stdout == "nothing was recorded\n"
    add_release(store, "r-1")
    add_release(store, "r-2")
    (newest,) = cli("audit", "list", "--limit", "1", "--json").records
    assert (newest["seq"], newest["subject"], newest["details"]["source"]) == (2, "r-2", "hf:a/b")
    assert [row["seq"] for row in cli("audit", "list", "--subject", "r-1", "--json").records] == [1]
    assert "release.add" in cli("audit", "list", "--after", "2").stdout
    done = cli("audit", "verify")
    assert (done.status, done.stdout) == (0, f"2 entries, whole; the last is 2:{newest['hash']}\n")
    (found,) = cli("audit", "verify", "--json", "--head", f"2:{newest['hash']}").records
    assert found == {"entries": 2, "hash": newest["hash"], "flaws": [], "whole": True}
    assert cli("audit", "verify", "--head", "nonsense").status == 2


def test_a_broken_chain_is_exit_status_1(bare_cli: Cli, sqlite_store: Store) -> None:
    bare_cli.env["CODE_WORKER_DATABASE_URL"] = sqlite_store.url
    add_release(sqlite_store, "r-1")
    add_release(sqlite_store, "r-2")
    head = bare_cli("audit", "verify").stdout.rpartition(" ")[2].strip()
    with_owner_rights(sqlite_store, "DROP TRIGGER audit_no_delete", "DELETE FROM audit WHERE seq = 2")
    assert bare_cli("audit", "verify").status == 0, "a cut at the end shows beside a noted head alone"
    cut = bare_cli("audit", "verify", "--head", head)
    assert (cut.status, "entry 2: it was noted with another hash, or is missing" in cut.stderr) == (1, True)
    with_owner_rights(sqlite_store, "DROP TRIGGER audit_no_update", "UPDATE audit SET actor = 'mallory'")
    broken = bare_cli("audit", "verify")
    assert (broken.status, broken.stdout) == (1, "")
    assert "entry 1: its hash is not that of what it says" in broken.stderr


def with_owner_rights(store: Store, *statements: str) -> None:
    opened = open_store(store.url)
    try:
        with opened.engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
    finally:
        opened.close()
