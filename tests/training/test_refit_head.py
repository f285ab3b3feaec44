"""A refit of one head: it is put beside the champion's others and becomes the challenger, without the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from code_worker.data.erasure.erase import Eraser
from code_worker.errors import ArtifactError, ConfigurationError, NoReleaseError, UnknownHeadError
from code_worker.plugins import load_plugins
from code_worker.releases.artifacts import open_artifacts
from code_worker.releases.manifest import Manifest
from code_worker.settings import Settings, load_settings
from code_worker.store.engine import Store
from code_worker.store.erasure import receipts, rows
from code_worker.store.erasure.scopes import Scope
from code_worker.store.learning import runs
from code_worker.training.gate.gate_inputs import trained_on
from code_worker.training.learner import Learner
from code_worker.training.refit import plan_heads
from code_worker.training.snapshot_embeddings import labelled_embeddings
from tests.training.learning import (
    build_champion,
    label,
    label_world,
    learning_settings,
    pictures,
    promote_champion,
    registry_of,
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return learning_settings(tmp_path / "data")


@pytest.fixture
def champion(settings: Settings, sqlite_store: Store, tmp_path: Path) -> str:
    return promote_champion(settings, sqlite_store, build_champion(tmp_path / "champion"))


def learn(settings: Settings, store: Store, **asked: Any) -> runs.Run:
    ended = Learner(settings, store).learn("refit", by="alice", **asked)
    assert ended is not None
    assert ended.state == "promoted", ended.reasons
    return ended


def test_a_new_head_is_fitted_beside_the_others_and_challenges(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    ended = learn(settings, sqlite_store, challenge=True, heads={"knn": {"n_neighbors": 3}})
    registry = registry_of(settings, sqlite_store)
    assert (registry.champion(), registry.challenger()) == (champion, ended.candidate)
    assert ended.reasons == ["it became the challenger, as was asked for: no gate compared it"]
    assert registry.show(ended.candidate or "").summary()["notes"] == f"refit of knn by run {ended.id}"
    assert "gate" not in ended.report
    assert (list(ended.report["heads"]), ended.report["heads"]["knn"]["n_neighbors"]) == (["knn"], 3)
    before, after = registry.load(champion), registry.load(str(ended.candidate))
    assert set(after.heads) == {"linear", "knn"}
    assert after.manifest.heads["linear"] == before.manifest.heads["linear"]
    assert after.encoder_sha256 == before.encoder_sha256
    assert after.manifest.heads["knn"].options["n_neighbors"] == 3
    assert after.manifest.default_head == "linear"
    assert after.manifest.evaluation["snapshot"] == ended.snapshot_id


def test_it_needs_no_new_labels_and_keeps_no_later_refit_from_running(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    first = learn(settings, sqlite_store, challenge=True, heads={"knn": {}})
    second = learn(settings, sqlite_store, challenge=True, heads={"svm": {}})
    assert registry_of(settings, sqlite_store).challenger() == second.candidate != first.candidate
    judged = learn(settings, sqlite_store)
    assert registry_of(settings, sqlite_store).champion() == judged.candidate != champion


def test_heads_that_were_kept_are_known_to_have_learned_what_their_release_did(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    bobs = set(label(settings, sqlite_store, pictures("real", 9, first=7000), "real", by="bob"))
    first = learn(settings, sqlite_store)
    without_bob = settings.labels.model_copy(update={"ignored": ("bob",)})
    second = learn(
        settings.model_copy(update={"labels": without_bob}), sqlite_store, challenge=True, heads={"knn": {}}
    )
    made = sqlite_store.run(lambda session: rows.learned_from(session, [str(first.snapshot_id)]), write=False)
    assert made == {first.candidate: "learned", second.candidate: "learned"}
    known = sqlite_store.run(lambda session: trained_on(session, str(second.candidate)), write=False)
    assert known.heads is not None
    assert {one.sha256 for one in known.heads} & bobs


def test_of_a_head_that_is_kept_of_an_imported_release_nobody_knows_what_it_learned(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    registry = registry_of(settings, sqlite_store)

    def heads_learned(release: str) -> int | None:
        known = sqlite_store.run(lambda session: trained_on(session, release), write=False).heads
        return None if known is None else len(known)

    beside = str(learn(settings, sqlite_store, challenge=True, heads={"knn": {}}).candidate)
    assert heads_learned(beside) is None, "its linear head is the imported release's"
    later = str(learn(settings, sqlite_store, challenge=True, heads={"linear": {}}).candidate)
    assert heads_learned(later), "nothing was kept of the imported release"
    alone = registry.drop_head(beside, "linear", default_head="knn", by="alice")
    assert heads_learned(alone) == heads_learned(later)
    registry.promote(beside, by="alice")
    upon = str(learn(settings, sqlite_store, challenge=True, heads={"svm": {}}).candidate)
    assert heads_learned(upon) is None, "it was kept twice"
    ended = Learner(settings, sqlite_store).learn("refit", by="alice", force=True)
    assert ended is not None
    assert ended.report["gate"]["unrecorded"] is True
    assert heads_learned(str(ended.candidate)), "every head was fitted again"


def test_of_one_head_it_is_known_what_that_one_learned(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    first = str(learn(settings, sqlite_store).candidate)
    later = set(label(settings, sqlite_store, pictures("real", 20, first=7000), "real"))
    second = str(learn(settings, sqlite_store, challenge=True, heads={"knn": {}}).candidate)

    def learned(release: str, head: str | None = None) -> set[str]:
        known = sqlite_store.run(lambda session: trained_on(session, release, head), write=False).heads
        assert known is not None
        return {one.sha256 for one in known}

    assert learned(second, "linear") == learned(first, "linear") == learned(first)
    assert not learned(second, "linear") & later, "the gate compares with the head as it is"
    assert learned(second, "knn") & later
    assert learned(second) == learned(second, "linear") | learned(second, "knn")
    dropped = registry_of(settings, sqlite_store).drop_head(second, "svm", by="alice")
    assert learned(dropped, "linear") == learned(first)
    assert learned(dropped, "knn") == learned(second, "knn")


def test_a_head_that_is_dropped_leaves_the_others_as_they_are(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    taught_here = learn(settings, sqlite_store)
    registry, whole = registry_of(settings, sqlite_store), str(taught_here.candidate)
    made = registry.drop_head(whole, "knn", by="alice")
    before, after = registry.load(whole), registry.load(made)
    assert set(after.heads) == {"linear", "svm"}
    assert after.manifest.notes == f"{whole} without head knn (drop-head)\n{before.manifest.notes}"
    assert after.manifest.heads == {name: before.manifest.heads[name] for name in after.heads}
    assert after.encoder_sha256 == before.encoder_sha256
    assert after.manifest.default_head == "linear"
    learned = sqlite_store.run(lambda session: rows.learned_from(session, [str(taught_here.snapshot_id)]))
    assert learned == {whole: "learned", made: "learned"}
    known = sqlite_store.run(lambda session: (trained_on(session, whole), trained_on(session, made)), write=False)
    assert known[0].heads
    assert {one.sha256 for one in known[1].heads or ()} == {one.sha256 for one in known[0].heads}


def test_heads_that_learned_what_was_erased_since_are_not_taken_over(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    bobs = set(label(settings, sqlite_store, pictures("real", 9, first=7000), "real", by="bob"))
    registry, whole = registry_of(settings, sqlite_store), str(learn(settings, sqlite_store).candidate)
    known = sqlite_store.run(lambda session: trained_on(session, whole), write=False).heads or ()
    erased = next(one.sha256 for one in known if one.sha256 in bobs)
    Eraser(settings, sqlite_store, wait_s=0).erase(Scope(sha256=erased), by="olga")
    assert sqlite_store.run(receipts.releases_owed, write=False) == {whole}
    with pytest.raises(ArtifactError, match=f"heads of {whole} learned from what was erased"):
        registry.drop_head(whole, "knn", by="alice")
    ended = Learner(settings, sqlite_store).learn("refit", by="alice", challenge=True, heads={"knn": {}})
    assert ended is not None
    assert ended.state == "failed"
    assert "must not be taken over" in ended.reasons[0]
    assert {one.info.id for one in registry.list()} == {champion, whole}
    kept = open_artifacts(settings).list()
    assert set(kept) == {champion, whole}, "what could not be registered is not left in the store"


def test_the_default_head_is_dropped_only_for_another(settings: Settings, sqlite_store: Store, champion: str) -> None:
    registry = registry_of(settings, sqlite_store)
    with pytest.raises(ConfigurationError, match=rf"{champion} are judged with 'linear' by default: it is the only"):
        registry.drop_head(champion, "linear", by="alice")
    with pytest.raises(UnknownHeadError, match="unknown head 'knn'; known: linear"):
        registry.drop_head(champion, "knn", by="alice")
    label_world(settings, sqlite_store)
    both = str(learn(settings, sqlite_store, challenge=True, heads={"knn": {}}).candidate)
    with pytest.raises(ConfigurationError, match="name another with --default-head"):
        registry.drop_head(both, "linear", by="alice")
    made = registry.drop_head(both, "linear", default_head="knn", by="alice")
    assert registry.load(made).manifest.default_head == "knn"


def test_embeddings_of_what_a_run_would_learn_from_are_given_for_a_head_to_be_tried_on(
    settings: Settings, sqlite_store: Store, champion: str
) -> None:
    label_world(settings, sqlite_store)
    here = settings.model_copy(update={"database_url": SecretStr(sqlite_store.url)})
    learned, held = (labelled_embeddings(settings=here, holdout=holdout) for holdout in (False, True))
    assert learned.release == held.release == champion
    assert learned.embeddings.shape == (len(learned.sha256), 192)
    assert learned.embeddings.dtype == np.float32
    assert learned.labels.dtype == np.int8
    assert not set(learned.sha256) & set(held.sha256)
    run = learn(settings, sqlite_store, challenge=True, heads={"knn": {}})
    assert run.report["snapshot"]["holdout"]["real"] == int((held.labels == 0).sum())
    fitted = registry_of(settings, sqlite_store).load(str(run.candidate)).heads["knn"]
    # Each is its own nearest reference, so these are the very embeddings that the run's head was fitted on.
    assert ((fitted.score(learned.embeddings) >= 0.5) == (learned.labels == 1)).all()
    with pytest.raises(NoReleaseError, match="no release 'r-000000000000'"):
        labelled_embeddings("r-000000000000", settings=here)


def test_options_come_from_the_release_the_settings_and_the_command_in_this_order(
    champion: str, settings: Settings, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE_WORKER_HEADS__LINEAR__C", "2.5")
    monkeypatch.setenv("CODE_WORKER_HEADS__LINEAR__CLASS_WEIGHT", '{"0": 1.0, "1": 2.0}')
    monkeypatch.setenv("CODE_WORKER_HEADS__KNN__N_NEIGHBORS", "5")
    plugins, configured = load_plugins(Settings()), load_settings().heads
    own: Manifest = registry_of(settings, sqlite_store).load(champion).manifest
    plans = plan_heads(plugins, own, configured)
    assert set(plans) == {"knn", "linear", "svm"}
    assert plans["knn"].options["n_neighbors"] == 5
    assert plans["linear"].options == {"C": 2.5, "class_weight": {"0": 1.0, "1": 2.0}, "max_iter": 1500}
    assert plan_heads(plugins, own, configured, {"knn": {"n_neighbors": 9}})["knn"].options["n_neighbors"] == 9
    assert plan_heads(plugins, own)["linear"].options["C"] == 0.316


def test_a_name_in_a_variable_stands_for_a_head_with_a_dash(tmp_path: Path) -> None:
    (tmp_path / "dashed.py").write_text(
        "from code_worker import HeadSpec, hookimpl\n"
        "@hookimpl\ndef code_worker_register_heads():\n"
        "    return [HeadSpec('far-off', 'code_worker_heads.knn:NearestNeighbourHead')]\n"
    )
    plugins = load_plugins(Settings(plugins_dir=tmp_path))
    assert plan_heads(plugins, None, {"far_off": {"n_neighbors": 4}})["far-off"].options["n_neighbors"] == 4
    with pytest.raises(UnknownHeadError, match=r"unknown head 'far_off'; known: .*; did you mean 'far-off'"):
        plan_heads(plugins, None, only={"far_off": {}})


def test_settings_of_a_head_that_nobody_offers_are_refused_with_the_nearest_name() -> None:
    plugins = load_plugins(Settings())
    with pytest.raises(
        ConfigurationError, match=r"head 'liner' \(\[heads\.liner\] or CODE_WORKER_HEADS__LINER__….*'linear'"
    ):
        plan_heads(plugins, None, {"knn": {"n_neighbors": 5}, "liner": {"C": 1}})
    with pytest.raises(ConfigurationError, match=r"head 'texture' .* no plugin offers; known: knn, linear, svm"):
        plan_heads(plugins, None, {"texture": {}})


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"heads": {"kn": {}}}, UnknownHeadError, "unknown head 'kn'; known: knn, linear, svm"),
        ({"heads": {"knn": {"k": 5}}}, ConfigurationError, "options of head 'knn': k: Extra inputs .*n_neighbors"),
        ({"heads": {"knn": {"n_neighbors": 0}}}, ConfigurationError, "n_neighbors: Input should be greater"),
    ],
)
def test_what_no_head_has_is_refused_before_a_run_begins(
    settings: Settings,
    sqlite_store: Store,
    champion: str,
    asked: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        Learner(settings, sqlite_store).learn("refit", by="alice", challenge=True, **asked)
    with pytest.raises(ConfigurationError, match="name heads for a refit"):
        Learner(settings, sqlite_store).learn("retrain", by="alice", heads={"knn": {}})
    for begin in (Learner(settings, sqlite_store).learn, Learner(settings, sqlite_store).plan):
        who = {"by": "alice"} if begin.__name__ == "learn" else {}
        with pytest.raises(ConfigurationError, match="which stays: ask for a challenge"):
            begin("refit", **who, heads={"knn": {}})
    assert sqlite_store.run(runs.list_runs, write=False) == []
