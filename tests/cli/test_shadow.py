from __future__ import annotations

from code_worker.store.engine import Store
from code_worker.store.learning import challenger_scores, labels
from code_worker.types import Label, ShadowScore
from tests.cli.conftest import Cli
from tests.cli.ledger_rows import judged


def score(store: Store, number: int, was: float, now: float, *, tenant: str | None = None) -> None:
    """The champion judged image `number`, the challenger r-2 scored it too."""
    job = judged(store, f"s3://b/{number}.jpg", was, tenant=tenant)
    said = ShadowScore(
        job_id=job,
        revision=0,
        sha256=f"{number:064x}",
        release="r-2",
        head="svm",
        score=now,
        label=Label.FAKE if now >= 0.5 else Label.REAL,
        champion="r-1",
        champion_head="linear",
        champion_score=was,
        champion_label=Label.FAKE if was >= 0.5 else Label.REAL,
        tenant=tenant,
    )
    store.run(lambda session: challenger_scores.add(session, [said]))


def label(store: Store, number: int, name: str) -> None:
    said = labels.NewLabel(f"{number:064x}", name, by="ann", source="api")
    store.run(lambda session: labels.add(session, [said]))


def test_before_anything_was_scored_the_way_to_it_is_named(cli: Cli) -> None:
    ran = cli("shadow", "report")
    assert ran.status == 0
    assert "code-worker releases challenge RELEASE" in ran.stdout
    assert cli("shadow", "report", "--json").stdout == ""


def test_the_report_says_how_often_where_and_who_was_right(cli: Cli, store: Store) -> None:
    for number, (was, now, tenant) in enumerate(
        [(0.1, 0.2, None), (0.9, 0.8, "acme"), (0.1, 0.7, "acme"), (0.8, 0.1, "acme"), (0.3, 0.6, None)]
    ):
        score(store, number, was, now, tenant=tenant)
    for number, name in ((0, "real"), (1, "real"), (2, "fake"), (3, "fake")):
        label(store, number, name)
    (report,) = cli("shadow", "report", "--json").records
    assert (report["release"], report["images"], report["champions"]) == ("r-2", 5, {"r-1": 5})
    assert report["agreement"] == 0.4
    assert round(report["shift"], 6) == 0.04
    assert report["confusion"]["real"] == {"real": 1, "fake": 2, "uncertain": 0}
    assert report["confusion"]["fake"] == {"real": 1, "fake": 1, "uncertain": 0}
    assert [(one["tenant"], one["images"]) for one in report["scopes"]] == [("acme", 3), (None, 2)]
    assert report["labelled"] == {"images": 4, "both": 1, "only_champion": 1, "only_challenger": 1, "neither": 1}
    assert [one["uri"] for one in report["disagreements"]][:3] == ["s3://b/3.jpg", "s3://b/2.jpg", "s3://b/4.jpg"]
    text = cli("shadow", "report", "--limit", "1").stdout
    assert "challenger r-2 beside r-1: 5 images" in text
    assert "they agree on 40.00%; its scores are +0.0400 away on average" in text
    assert "both are right on 1, only the champion on 1, only the challenger on 1, neither on 1" in text
    assert "fake 0.800 linear" in text
    assert "s3://b/2.jpg" not in text


def test_the_report_can_be_narrowed(cli: Cli, store: Store) -> None:
    score(store, 1, 0.1, 0.2, tenant="acme")
    score(store, 2, 0.1, 0.2)
    (acme,) = cli("shadow", "report", "--tenant", "acme", "--since", "1h", "--json").records
    assert acme["images"] == 1
    assert "nobody knows who is right" in cli("shadow", "report").stdout
    for nothing in (("--until", "1h"), ("--release", "r-9"), ("--content-type", "avatar")):
        ran = cli("shadow", "report", *nothing)
        assert ran.status == 0
        assert "has scored nothing that matches" in ran.stdout
    (empty,) = cli("shadow", "report", "--release", "r-9", "--json").records
    assert (empty["images"], empty["agreement"], empty["disagreements"]) == (0, None, [])
