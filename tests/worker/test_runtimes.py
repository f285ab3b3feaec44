"""Following the champion: a batch keeps its release, a release that does not load changes nothing."""

from __future__ import annotations

import pytest

from code_worker.errors import IntegrityError
from code_worker.moderation.runtime import Runtime
from code_worker.worker.judging import runtimes
from code_worker.worker.judging.runtimes import Runtimes
from tests.moderation.doubles import MeanEmbedder, runtime


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_JITTER_S", 0.0)


class Alias:
    """Points where the test says."""

    def __init__(self) -> None:
        self.release: str | None = None
        self.broken: set[str] = set()
        self.loaded: dict[str, MeanEmbedder] = {}

    def champion(self) -> str | None:
        return self.release

    def load(self, release: str) -> Runtime:
        if release in self.broken:
            raise IntegrityError(f"{release}: encoder/model.safetensors differs from the manifest")
        self.loaded[release] = MeanEmbedder()
        return runtime(self.loaded[release], release=release)


def test_a_batch_keeps_the_release_it_began_with() -> None:
    alias = Alias()
    held = Runtimes(alias.champion, alias.load)
    with held.use() as nothing:
        assert nothing is None
    alias.release = "r-1"
    held.follow()
    with held.use() as first:
        assert first is not None
        alias.release = "r-2"
        held.follow()
        with held.use() as second:
            assert second is not None
            assert (first.release, second.release) == ("r-1", "r-2")
        assert not alias.loaded["r-1"].closed
    assert alias.loaded["r-1"].closed
    assert not alias.loaded["r-2"].closed
    held.close()
    assert alias.loaded["r-2"].closed


def test_a_release_that_nobody_uses_is_closed_at_the_swap() -> None:
    alias = Alias()
    held = Runtimes(alias.champion, alias.load)
    for name in ("r-1", "r-2"):
        alias.release = name
        held.follow()
    assert alias.loaded["r-1"].closed
    assert held.release == "r-2"


def test_an_alias_that_may_point_nowhere_takes_its_release_out_of_use() -> None:
    alias = Alias()
    held = Runtimes(alias.champion, alias.load, alias="challenger", required=False)
    held.follow()
    alias.release = "r-1"
    held.follow()
    with held.use() as used:
        assert used is not None
        alias.release = None
        held.follow()
        assert held.release is None
        assert not alias.loaded["r-1"].closed
    assert alias.loaded["r-1"].closed
    champion = Runtimes(alias.champion, alias.load)
    alias.release = "r-2"
    champion.follow()
    alias.release = None
    champion.follow()
    assert champion.release == "r-2", "what judges stays"


def test_a_release_that_was_given_up_comes_back_only_after_the_alias_pointed_elsewhere() -> None:
    alias = Alias()
    held = Runtimes(alias.champion, alias.load)
    alias.release = "r-1"
    held.follow()
    held.give_up("r-1")
    assert alias.loaded.pop("r-1").closed
    held.follow()
    assert (held.release, alias.loaded) == (None, {})
    for release in ("r-2", "r-1"):
        alias.release = release
        held.follow()
        assert held.release == release


def test_encoding_is_what_the_encoder_in_use_says() -> None:
    alias = Alias()
    held = Runtimes(alias.champion, alias.load)
    assert not held.encoding
    alias.release = "r-1"
    held.follow()
    assert not held.encoding
    alias.loaded["r-1"].busy = True
    assert held.encoding


def test_a_release_that_does_not_load_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alias = Alias()
    held = Runtimes(alias.champion, alias.load)
    alias.release = "r-1"
    held.follow()
    alias.broken.add("r-2")
    alias.release = "r-2"
    held.follow()
    assert held.release == "r-1"
    assert held.refused == ("r-2", "r-2: encoder/model.safetensors differs from the manifest")
    assert not alias.loaded["r-1"].closed
    alias.broken.clear()
    held.follow()
    assert held.release == "r-1", "a release that just failed is not tried again at once"
    monkeypatch.setattr(runtimes, "_RETRY_S", -1.0)
    held.follow()
    assert held.release == "r-2"
    assert held.refused is None
