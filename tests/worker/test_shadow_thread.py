"""The challenger's thread: it takes what it is given in spare moments and holds up nobody."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import text

from code_worker.errors import TransientError
from code_worker.moderation.runtime import Runtime
from code_worker.settings import Settings
from code_worker.store import embeddings, jobs
from code_worker.store.engine import Store
from code_worker.types import ImageFacts, Label, Outcome, Provenance, RejectReason, Verdict
from code_worker.worker.judging import shadowing as module
from code_worker.worker.judging.shadowing import Shadow
from tests.moderation.doubles import FirstValueHead, MeanEmbedder, png, runtime
from tests.store.acts import accept
from tests.worker.harness import wait_until

CHAMPION = runtime()


class Challenger:
    """The alias, the runtime behind it, and whether the champion has work."""

    def __init__(self, store: Store, embedder: MeanEmbedder | None = None, **heads: Any) -> None:
        self.runtime = replace(runtime(embedder or MeanEmbedder(), release="r-new", **heads), encoder_sha256="f" * 64)
        self.release: str | None = "r-new"
        self.loads = 0
        self.busy = False
        self.shadow = Shadow(
            lambda: self.release, self._load, Settings(worker={"release_poll_s": 60}), store, lambda: self.busy
        )

    def _load(self, release: str) -> Runtime:
        self.loads += 1
        return replace(self.runtime, release=release)


@pytest.fixture
def challenge(sqlite_store: Store) -> Iterator[Callable[..., Challenger]]:
    made: list[Challenger] = []
    accept(sqlite_store, *(jobs.NewJob(f"s3://b/{value}", id=job_of(value)) for value in range(256)))

    def start(*, started: bool = True, **parts: Any) -> Challenger:
        made.append(challenger := Challenger(sqlite_store, **parts))
        challenger.shadow.runtimes.follow()
        if started:
            challenger.shadow.start()
        return challenger

    yield start
    for challenger in made:
        challenger.busy = False
        challenger.shadow.close()


def job_of(value: int) -> str:
    return f"00000000-0000-7000-8000-{value:012d}"


def judge(shadow: Shadow, *values: int) -> None:
    """As a worker does with a batch of grey images, once their verdicts are written."""
    with shadow.watch(CHAMPION) as sight:
        if sight is None:
            return
        verdicts = []
        for value in values:
            sha256 = hashlib.sha256(png(value)).hexdigest()
            sight.saw_crop(sha256, np.full((224, 224, 3), value, np.uint8))
            verdicts.append(
                Verdict(
                    job_of(value),
                    f"s3://b/{value}",
                    Outcome.JUDGED,
                    Label.REAL,
                    0.1,
                    facts=ImageFacts(sha256, 10),
                    provenance=Provenance(release="r-test", head="linear", policy="published", low=0.5, high=0.5),
                )
            )
        shadow.offer(sight, verdicts)


def scored(store: Store) -> dict[int, float]:
    with store.engine.connect() as connection:
        rows = connection.execute(text("select job_id, score from shadow_scores")).all()
    return {int(str(job).replace("-", "")[-12:]): score for job, score in rows}


def scored_soon(store: Store, count: int) -> dict[int, float]:
    found: dict[int, float] = wait_until(
        lambda: len(scored(store)) >= count and scored(store), 120, f"{count} shadow scores"
    )
    return found


def test_it_scores_what_it_is_given_and_keeps_the_embeddings(
    challenge: Callable[..., Challenger], sqlite_store: Store
) -> None:
    challenger = challenge()
    judge(challenger.shadow, 51, 102)
    judge(challenger.shadow, 51)
    assert scored_soon(sqlite_store, 2) == {51: pytest.approx(0.2), 102: pytest.approx(0.4)}
    sha256 = hashlib.sha256(png(51)).hexdigest()
    assert set(sqlite_store.run(lambda session: embeddings.known(session, "f" * 64, [sha256]))) == {sha256}


def test_embeddings_that_it_made_before_are_not_made_again(
    challenge: Callable[..., Challenger], sqlite_store: Store
) -> None:
    sha256 = hashlib.sha256(png(51)).hexdigest()
    vector = np.full(192, 0.7, "<f4").tobytes()
    sqlite_store.run(lambda session: embeddings.keep(session, "f" * 64, {sha256: vector}))
    embedder = MeanEmbedder()
    judge(challenge(embedder=embedder).shadow, 51)
    assert scored_soon(sqlite_store, 1) == {51: pytest.approx(0.7)}
    assert embedder.crops == 0


def test_it_waits_until_the_champion_has_no_work(
    challenge: Callable[..., Challenger], sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()
    embedder = MeanEmbedder()
    challenger = challenge(embedder=embedder, started=False)
    challenger.busy = True
    monkeypatch.setattr(challenger.shadow, "_busy", lambda: looked.set() or challenger.busy)
    challenger.shadow.start()
    judge(challenger.shadow, 51)
    assert looked.wait(120)
    assert embedder.crops == 0
    challenger.busy = False
    scored_soon(sqlite_store, 1)


def test_a_job_that_was_erased_while_it_waited_for_its_score_gets_none(
    challenge: Callable[..., Challenger], sqlite_store: Store
) -> None:
    challenger = challenge(started=False)
    judge(challenger.shadow, 51, 102)
    with sqlite_store.engine.begin() as connection:
        connection.execute(text("DELETE FROM jobs WHERE uri = 's3://b/51'"))
    challenger.shadow.start()
    assert scored_soon(sqlite_store, 1).keys() == {102}
    hashes = {value: hashlib.sha256(png(value)).hexdigest() for value in (51, 102)}
    known = sqlite_store.run(lambda session: embeddings.known(session, "f" * 64, hashes.values()))
    assert known.keys() == {hashes[102]}


def test_what_does_not_fit_is_dropped_and_nobody_waits(
    challenge: Callable[..., Challenger], sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING_BYTES", 3 * 224 * 224 * 3 + 3 * 4096)
    challenger = challenge(started=False)
    judge(challenger.shadow, 1, 2)
    judge(challenger.shadow, 3, 4)
    challenger.shadow.start()
    assert set(scored_soon(sqlite_store, 3)) == {1, 2, 3}
    wait_until(lambda: challenger.shadow._budget.take(3 * 224 * 224 * 3), 120, "the room to be free again")


def test_a_batch_that_came_to_nothing_gives_its_room_back(
    challenge: Callable[..., Challenger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING_BYTES", 224 * 224 * 3 + 4096)
    challenger = challenge(started=False)
    with challenger.shadow.watch(CHAMPION) as sight:
        assert sight is not None
        sight.saw_crop("a" * 64, np.zeros((224, 224, 3), np.uint8))
        assert sight.images
    assert challenger.shadow._budget.take(224 * 224 * 3 + 4096)


def test_a_head_that_raises_ends_neither_the_thread_nor_its_neighbours(
    challenge: Callable[..., Challenger], sqlite_store: Store
) -> None:
    class Moody(FirstValueHead):
        def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
            if (embeddings < 0.1).any():
                raise SystemError("broken on dark images")
            return super().score(embeddings)

    challenger = challenge(linear=Moody())
    judge(challenger.shadow, 1, 2)
    judge(challenger.shadow, 3, 204)
    assert scored_soon(sqlite_store, 1) == {204: pytest.approx(0.8)}


def test_a_challenger_without_memory_is_let_go_until_the_alias_moves(
    challenge: Callable[..., Challenger], sqlite_store: Store
) -> None:
    full = MeanEmbedder(lambda _: TransientError(RejectReason.MODEL_UNAVAILABLE, "out of memory for a single crop"))
    challenger = challenge(embedder=full)
    judge(challenger.shadow, 1)
    runtimes = challenger.shadow.runtimes
    wait_until(lambda: runtimes.release is None and full.closed, 120, "the challenger to be let go")
    runtimes.follow()
    assert (runtimes.release, challenger.loads) == (None, 1)
    with challenger.shadow.watch(CHAMPION) as sight:
        assert sight is None
    challenger.runtime = replace(challenger.runtime, embedder=MeanEmbedder())
    challenger.release = "r-newer"
    runtimes.follow()
    judge(challenger.shadow, 204)
    assert scored_soon(sqlite_store, 1) == {204: pytest.approx(0.8)}


def test_without_a_challenger_nothing_is_looked_at(challenge: Callable[..., Challenger]) -> None:
    challenger = challenge()
    runtimes = challenger.shadow.runtimes
    with challenger.shadow.watch(replace(CHAMPION, release="r-new")) as sight:
        assert sight is None, "it became the champion"
    challenger.release = None
    runtimes.follow()
    assert runtimes.release is None
    with challenger.shadow.watch(CHAMPION) as sight:
        assert sight is None


def test_work_for_a_challenger_that_was_replaced_is_left(
    challenge: Callable[..., Challenger], sqlite_store: Store
) -> None:
    challenger = challenge(started=False)
    judge(challenger.shadow, 1)
    challenger.release = "r-newer"
    challenger.shadow.runtimes.follow()
    judge(challenger.shadow, 2)
    challenger.shadow.start()
    assert set(scored_soon(sqlite_store, 1)) == {2}


def test_closing_does_not_wait_for_a_busy_champion(challenge: Callable[..., Challenger]) -> None:
    class Unasked(MeanEmbedder):
        def submit(self, crop: NDArray[np.uint8], priority: int = 4, turn: int = 0) -> Future[NDArray[np.float32]]:
            raise AssertionError("the champion has work")

    challenger = challenge(embedder=Unasked())
    challenger.busy = True
    judge(challenger.shadow, 1)
    challenger.shadow.close()
    assert not challenger.shadow._thread.is_alive()
