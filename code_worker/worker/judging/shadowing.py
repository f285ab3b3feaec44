"""The challenger in a worker: scores what the champion judged, in spare moments, and never acts."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.errors import CodeWorkerError, ImageRejectedError, TransientError
from code_worker.images.decode import decode_crop
from code_worker.logs import get_logger
from code_worker.moderation.shadow import Budget, ShadowBatch, shadow_scores
from code_worker.moderation.vectors import pack, unpack
from code_worker.store import embeddings
from code_worker.store.learning import challenger_scores
from code_worker.store.releases import CHALLENGER
from code_worker.types import Verdict
from code_worker.wire import chunks
from code_worker.worker.background import Repeater
from code_worker.worker.judging.runtimes import Runtimes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sqlalchemy.orm import Session

    from code_worker.moderation.runtime import Runtime
    from code_worker.settings import Settings
    from code_worker.store.engine import Store

    Embeddings = dict[str, NDArray[np.float32]]


log = get_logger(__name__)
_MAX_WAITING_BYTES: Final = 64 * 2**20
_TOGETHER: Final = 16
"""Crops between two looks whether the champion has work."""
_LOOK_S: Final = 0.01
_SAY_EVERY_S: Final = 60.0
_NICEST: Final = 19


class Shadow:
    """Follows the alias `challenger` and scores in one thread, of the lowest priority that the system has.

    The champion waits for nothing here: batches are handed over without blocking, what does not fit is dropped and
    counted, and the encoder is used only while the champion's has no work. Anything the challenger raises is logged,
    at most once a minute; one whose encoder fails for good is let go.
    """

    def __init__(
        self,
        wanted: Callable[[], str | None],
        load: Callable[[str], Runtime],
        settings: Settings,
        store: Store,
        busy: Callable[[], bool],
    ) -> None:
        """Begins without a challenger.

        Args:
            wanted: id of the release that is the challenger now.
            load: makes its runtime; the encoder must not start before it is used.
            settings: limits, share, how often to look.
            store: where its scores go.
            busy: whether the champion's encoder has work at this moment.
        """
        self.runtimes = Runtimes(wanted, load, alias=CHALLENGER, required=False)
        self._settings = settings
        self._store = store
        self._busy = busy
        self._budget = Budget(_MAX_WAITING_BYTES)
        self._say = _Seldom()
        self._waiting: deque[ShadowBatch] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        # Not the champion's follower: a challenger that loads slowly must not hold up a rollback.
        self._follower = Repeater("follow-challenger", settings.worker.release_poll_s, self.runtimes.follow)

    def start(self) -> None:
        """Begins to follow and to score."""
        self._thread.start()
        self._follower.start()

    @contextmanager
    def watch(self, champion: Runtime) -> Iterator[ShadowBatch | None]:
        """Yields the observer of a champion's batch, or None while there is no challenger."""
        batch = self._batch_for(champion)
        try:
            yield batch
        finally:
            if batch is not None and not batch.verdicts:
                batch.free()

    def _batch_for(self, champion: Runtime) -> ShadowBatch | None:
        share = self._settings.shadow.share
        with self.runtimes.use() as challenger:
            if challenger is None or challenger.release == champion.release or share <= 0:
                return None
            return ShadowBatch(challenger, champion, share, self._budget)

    def offer(self, batch: ShadowBatch, verdicts: Sequence[Verdict]) -> None:
        """Hands over what was seen of a batch, now that its verdicts are in the ledger; never blocks."""
        if batch.dropped:
            self._say(log.warning, "shadow_dropped", batch.dropped, release=batch.release)
        batch.verdicts = verdicts
        if not batch.judged():
            batch.verdicts = ()
            return
        with self._changed:
            self._waiting.append(batch)
            self._changed.notify()

    def _work(self) -> None:
        if sys.platform == "linux":
            # There niceness is each thread's own, and threads that this one starts (the encoder's) inherit it.
            with suppress(OSError):  # a sandbox may forbid it, and it is a courtesy
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
        while (batch := self._next()) is not None:
            try:
                self._score(batch)
            except CodeWorkerError as error:
                self._say(log.warning, "shadow_failed", len(batch.images), release=batch.release, error=str(error))
            except Exception as error:  # noqa: BLE001 - outermost frame: it must outlive what a plugin or a device raises
                self._say(log.error, "shadow_broke", len(batch.images), release=batch.release, exc_info=error)
            finally:
                batch.free()

    def _next(self) -> ShadowBatch | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            return None if self._stopping else self._waiting.popleft()

    def _score(self, batch: ShadowBatch) -> None:
        with self.runtimes.use() as challenger:
            if challenger is None or challenger.release != batch.release:
                return
            vectors, fresh = self._embeddings(batch, challenger)

            def failed(head: str, error: BaseException, images: int) -> None:
                self._say(log.error, "shadow_head_failed", images, release=batch.release, head=head, exc_info=error)

            scores = shadow_scores(batch, vectors, challenger, failed)
        keep = fresh if self._settings.worker.store_embeddings else {}
        named: dict[str, list[str]] = {}
        for sha256, verdict in batch.judged():
            named.setdefault(sha256, []).append(verdict.job_id)

        def write(session: Session) -> None:
            # Some time after the verdicts: what was erased meanwhile is left out.
            challenger_scores.add(session, scores)
            embeddings.keep(session, challenger.encoder_sha256, keep, jobs=named)

        self._store.run(write)

    def _embeddings(self, batch: ShadowBatch, challenger: Runtime) -> tuple[Embeddings, dict[str, bytes]]:
        """By content hash, all that can be had; and those that were computed now, as they are stored."""
        wanted = dict.fromkeys(sha256 for sha256, _ in batch.judged())
        if batch.same_encoder:
            return {sha256: np.asarray(batch.images[sha256]) for sha256 in wanted}, {}
        found = self._known(challenger.encoder_sha256, list(wanted))
        fresh: dict[str, bytes] = {}
        for some in chunks((sha256 for sha256 in wanted if sha256 not in found), _TOGETHER):
            encoded = self._encode({sha256: batch.images[sha256] for sha256 in some}, challenger)
            found |= encoded
            fresh |= {sha256: pack(vector) for sha256, vector in encoded.items()}
        return found, fresh

    def _known(self, encoder_sha256: str, hashes: Sequence[str]) -> Embeddings:
        if not self._settings.worker.store_embeddings:
            return {}
        return unpack(self._store.look(lambda session: embeddings.known(session, encoder_sha256, hashes)))

    def _encode(self, images: Mapping[str, NDArray[Any] | bytes], challenger: Runtime) -> Embeddings:
        crops = {sha256: crop for sha256, image in images.items() if (crop := self._crop(image)) is not None}
        encoded: Embeddings = {}
        while self._busy():
            if self._stopping or self.runtimes.release != challenger.release:
                return encoded
            time.sleep(_LOOK_S)
        try:
            futures = {sha256: challenger.embedder.submit(crop, 0) for sha256, crop in crops.items()}
            for sha256, future in futures.items():
                try:
                    encoded[sha256] = future.result()
                except ImageRejectedError as error:
                    self._say(log.warning, "shadow_image_failed", 1, release=challenger.release, error=str(error))
        except TransientError as error:
            # Out of memory or a lost device: what the challenger takes, the champion may need.
            self.runtimes.give_up(challenger.release)
            log.error("challenger_given_up", release=challenger.release, error=str(error))
            raise
        return encoded

    def _crop(self, image: NDArray[Any] | bytes) -> NDArray[np.uint8] | None:
        if not isinstance(image, bytes):
            return image
        try:
            return decode_crop(image, self._settings.limits)
        except ImageRejectedError:  # its verdict is older than a limit or a reader of today
            return None

    def close(self) -> None:
        """Ends following and scoring; what still waits is dropped."""
        self._follower.stop()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_SAY_EVERY_S / 6)
        self.runtimes.close()


class _Seldom:
    """Logs an event at most once a minute, with the number of images that it happened to since it was last said."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: dict[str, int] = {}
        self._said: dict[str, float] = {}

    def __call__(self, say: Callable[..., Any], event: str, images: int, **facts: object) -> None:
        with self._lock:
            self._images[event] = self._images.get(event, 0) + images
            now = time.monotonic()
            if now - self._said.get(event, -_SAY_EVERY_S) < _SAY_EVERY_S:
                return
            self._said[event] = now
            images = self._images.pop(event)
        say(event, images=images, **facts)
