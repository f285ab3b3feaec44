"""`code-worker rescore` over a real ledger and real releases."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from code_worker.data.kept_copies import LocalKept
from code_worker.encoder.weights import read_weights
from code_worker.plugins import load_plugins
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.loading import load_release
from code_worker.releases.manifest import Source, read_manifest, release_id
from code_worker.settings import Settings
from code_worker.store import jobs, verdicts
from code_worker.store.engine import Store
from code_worker.store.learning import kept_images
from code_worker.types import ImageFacts, Label, Outcome, Provenance, RejectReason, Verdict
from tests.cli.conftest import Cli
from tests.cli.ledger_rows import rejected
from tests.toy_release import write_toy_release
from tests.worker.harness import jpeg

IMAGES = 5
SINCE = ("rescore", "--since", "1h")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small release that judges with svm, and one with the same encoder that judges with linear."""
    directory, plugins = tmp_path_factory.mktemp("two"), load_plugins(Settings())
    whole = write_toy_release(directory / "whole", depth=1, images=8)
    heads, made = load_release(whole, plugins).heads, []
    for names in (["svm", "linear"], ["linear"]):
        target = directory / names[0]
        facts = ReleaseFacts(source=Source(uri="test"), default_head=names[0], toy=True)
        build_from_parts(target, read_weights(whole), {name: heads[name] for name in names}, plugins, facts)
        made.append(target)
    return made


def id_of(directory: Path) -> str:
    return release_id(read_manifest(directory)[1])


def with_files(cli: Cli, files: Path) -> Cli:
    files.mkdir()
    cli.env |= {"CODE_WORKER_FILES__ROOTS": f'["{files}"]', "CODE_WORKER_DEVICE": "cpu"}
    return cli


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def judging_cli(cli: Cli, files: Path, two: list[Path]) -> Cli:
    """With the first release as champion."""
    assert with_files(cli, files)("releases", "import", str(two[0]), "--promote").status == 0
    return cli


@pytest.fixture
def judging_sqlite_cli(sqlite_cli: Cli, files: Path, two: list[Path]) -> Cli:
    assert with_files(sqlite_cli, files)("releases", "import", str(two[0]), "--promote").status == 0
    return sqlite_cli


def history(
    store: Store, files: Path, count: int = IMAGES, *, tenant: str | None = None, first: int = 0
) -> list[str]:
    """Files that an older release held to be fake; returns the jobs' ids."""
    uris = [str(files / f"{number}.jpg") for number in range(first, first + count)]
    ids = store.run(lambda session: jobs.accept(session, [jobs.NewJob(uri, tenant=tenant) for uri in uris]))
    store.run(lambda session: jobs.claim(session, ids, owner="test", lease_s=60, max_attempts=3))
    made = []
    for number, (job, uri) in enumerate(zip(ids, uris, strict=True), first):
        Path(uri).write_bytes(jpeg(number))
        facts = ImageFacts(hashlib.sha256(jpeg(number)).hexdigest(), len(jpeg(number)), "jpeg", 240, 240, "RGB")
        by = Provenance("r-old", "a" * 64, "linear", "b" * 64, "published", 0.5, 0.5, "0.0")
        made.append(Verdict(job, uri, Outcome.JUDGED, Label.FAKE, 0.9, facts=facts, provenance=by, tenant=tenant))
    store.run(lambda session: verdicts.write(session, made))
    return ids


def live(store: Store, job: str) -> Verdict:
    found = store.run(lambda session: verdicts.live(session, job), write=False)
    assert found is not None
    return found


def report(cli: Cli, *words: str) -> dict[str, Any]:
    (record,) = cli(*SINCE, "--json", *words).records
    return dict(record)


def test_history_is_judged_from_its_images_and_then_from_stored_embeddings(
    judging_cli: Cli, store: Store, files: Path, two: list[Path]
) -> None:
    ids = history(store, files)
    old = [live(store, job) for job in ids]
    ran = judging_cli(*SINCE)
    assert ran.status == 0
    assert f"5 verdicts looked at, 5 were given again by {id_of(two[0])}; 0 say so already" in ran.stdout
    first = [live(store, job) for job in ids]
    assert [one.supersedes for one in first] == [one.id for one in old]
    assert {(one.release, one.head, one.revision) for one in first} == {(id_of(two[0]), "svm", 1)}
    for number in range(IMAGES):
        (files / f"{number}.jpg").unlink()
    assert judging_cli("releases", "import", str(two[1])).status == 0
    again = report(judging_cli, "--release", id_of(two[1]))
    assert (again["release"], again["examined"], again["rescored"], again["left"]) == (id_of(two[1]), 5, 5, {})
    second = [live(store, job) for job in ids]
    assert [one.supersedes for one in second] == [one.id for one in first]
    assert {(one.release, one.head, one.revision) for one in second} == {(id_of(two[1]), "linear", 2)}
    assert [one.facts for one in second] == [one.facts for one in first]
    moves = again["transitions"]
    for was in Label:
        for now in Label:
            expected = sum((a.label, b.label) == (was, now) for a, b in zip(first, second, strict=True))
            assert moves[was][now] == expected


def test_begun_again_it_does_only_what_is_left(judging_sqlite_cli: Cli, sqlite_store: Store, files: Path) -> None:
    cli, store = judging_sqlite_cli, sqlite_store
    ids = history(store, files)
    assert report(cli, "--limit", "2")["rescored"] == 2
    rest = report(cli)
    assert (rest["examined"], rest["rescored"], rest["unchanged"]) == (5, 3, 2)
    nothing = report(cli)
    assert (nothing["rescored"], nothing["unchanged"], nothing["mean_shift"]) == (0, 5, None)
    assert {live(store, job).revision for job in ids} == {1}
    assert cli("policies", "set", "--low", "0.1", "--high", "0.9").status == 0
    assert report(cli)["rescored"] == 5, "thresholds of today are another answer"


def test_a_dry_run_writes_nothing(judging_sqlite_cli: Cli, sqlite_store: Store, files: Path) -> None:
    ids = history(sqlite_store, files)
    ran = judging_sqlite_cli(*SINCE, "--dry-run")
    assert ran.status == 0
    assert "5 would be given again" in ran.stdout
    assert {live(sqlite_store, job).revision for job in ids} == {0}
    with sqlite_store.engine.connect() as connection:
        assert connection.execute(text("select count(*) from embeddings")).scalar_one() == 0


def test_what_cannot_be_judged_again_is_left_counted_and_said(
    judging_sqlite_cli: Cli, sqlite_store: Store, files: Path, tmp_path: Path
) -> None:
    cli, store = judging_sqlite_cli, sqlite_store
    gone, changed, kept, there = history(store, files, 4)
    (files / "0.jpg").unlink()
    (files / "1.jpg").write_bytes(jpeg(99))
    (files / "2.jpg").unlink()
    sha256 = LocalKept(tmp_path / "data" / "dataset").put(jpeg(2))
    note = kept_images.KeptImage(sha256, 1, "jpeg", 240, 240, "file:2")
    store.run(lambda session: kept_images.note_kept(session, [note]))
    ran = cli(*SINCE)
    assert ran.status == 1
    assert "the source has it no more, and no copy was kept" in ran.stdout
    assert "the source has other bytes now, and no copy was kept" in ran.stdout
    assert [live(store, job).revision for job in (gone, changed, kept, there)] == [0, 0, 1, 1]
    again = cli(*SINCE, "--json")
    assert again.status == 1
    assert again.records[0]["left"] == {"content_changed": 1, "not_found": 1}


def test_only_what_is_asked_for_is_judged_again(judging_sqlite_cli: Cli, sqlite_store: Store, files: Path) -> None:
    cli, store = judging_sqlite_cli, sqlite_store
    history(store, files, 2)
    acme = history(store, files, 2, tenant="acme", first=2)
    rejected(store, "s3://b/a", RejectReason.FETCH_FAILED)
    for nothing in (("--until", "1h"), ("--label", "real"), ("--tenant", "nobody")):
        assert report(cli, *nothing)["examined"] == 0, nothing
    assert report(cli, "--tenant", "acme", "--label", "fake", "--head", "linear")["rescored"] == 2
    assert {live(store, job).head for job in acme} == {"linear"}
    assert report(cli)["examined"] == 4, "a rejected image is no business of it"


def test_a_verdict_says_which_one_it_judges_again(judging_cli: Cli, store: Store, files: Path) -> None:
    (job,) = history(store, files, 1)
    old = live(store, job)
    judging_cli(*SINCE)
    shown = judging_cli("verdicts", "show", job).stdout
    assert f"{old.id}, which stays" in shown
    assert "judges again" not in judging_cli("verdicts", "show", str(old.id)).stdout
    (now,) = judging_cli("verdicts", "list", "--json").records
    both = judging_cli("verdicts", "list", "--json", "--superseded").records
    assert [one["supersedes"] for one in both] == [now["supersedes"], None] == [old.id, None]
    assert [one["supersedes"] for one in judging_cli("verdicts", "export").records] == [old.id]
    assert (
        judging_cli("verdicts", "export", "--csv").stdout.splitlines()[0].endswith("revision,supersedes,created_at")
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rescore",), "--since"),
        ((*SINCE, "--head", "nope"), "unknown head 'nope'"),
        ((*SINCE, "--release", "r-0123456789ab"), "no release 'r-0123456789ab'"),
        ((*SINCE, "--limit", "0"), "0"),
    ],
)
def test_wrong_use_ends_with_status_2(judging_sqlite_cli: Cli, words: tuple[str, ...], said: str) -> None:
    ran = judging_sqlite_cli(*words)
    assert ran.status == 2
    assert said in ran.stderr
    assert not ran.stdout


def test_without_a_champion_there_is_nothing_to_judge_with(sqlite_cli: Cli) -> None:
    ran = sqlite_cli(*SINCE)
    assert ran.status == 2
    assert "no champion to judge with" in ran.stderr
