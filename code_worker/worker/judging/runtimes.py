"""Follows an alias: loads a new release beside the old one and swaps between batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from code_worker.errors import CodeWorkerError
from code_worker.logs import get_logger
from code_worker.moderation.runtime import Runtime
from code_worker.store.releases import CHAMPION
from code_worker.system.machine import jittered

log = get_logger(__name__)
_RETRY_S = 30.0
_JITTER_S = 2.0


@dataclass(slots=True, eq=False)
class _Held:
    runtime: Runtime
    users: int = 0
    retired: bool = False


class Runtimes:
    """The runtime in use; a batch keeps the one it began with."""

    def __init__(
        self,
        wanted: Callable[[], str | None],
        load: Callable[[str], Runtime],
        *,
        alias: str = CHAMPION,
        required: bool = True,
    ) -> None:
        """Begins with none.

        Args:
            wanted: id of the release that the alias points to now.
            load: makes the runtime of a release.
            alias: its name, for the log.
            required: whether the last release stays in use while the alias points nowhere.
        """
        self._wanted = wanted
        self._load = load
        self._alias = alias
        self._required = required
        # Set by the thread that cannot use a release, taken back by the one that follows the alias.
        self._given_up: str | None = None
        # Guards `_current` and what its users count. Invariant: a retired runtime is closed once, by the last of its
        # users or, where it has none, by the swap. All else is replaced whole, by the thread that follows the alias.
        self._lock = threading.Lock()
        self._current: _Held | None = None
        self._failed: tuple[str, float] | None = None
        self._refused: tuple[str, str] | None = None
        self._waiting_said = False

    @contextmanager
    def use(self) -> Iterator[Runtime | None]:
        """The current runtime for the length of a batch; None while there is none."""
        with self._lock:
            held = self._current
            if held is not None:
                held.users += 1
        try:
            yield held.runtime if held else None
        finally:
            if held is not None:
                with self._lock:
                    held.users -= 1
                    close = held.retired and not held.users
                if close:
                    # Outside of the lock: closing waits for the device, and
                    # batches of the new release must not wait for that.
                    held.runtime.embedder.close()

    @property
    def release(self) -> str | None:
        """Id of the release in use."""
        # Read once: the thread that follows the alias may replace it at any moment. So in the two below.
        held = self._current
        return held.runtime.release if held else None

    @property
    def refused(self) -> tuple[str, str] | None:
        """Id of the release that did not load when it was wanted last, and why; None once one is in use.

        Texts of our own errors name releases, heads and plugins, and no image; of others it is the type alone.
        """
        return self._refused

    @property
    def failure(self) -> BaseException | None:
        """Returns what ended the device of the release in use, if anything did."""
        held = self._current
        return held.runtime.embedder.failure if held else None

    @property
    def encoding(self) -> bool:
        """True if the encoder of the release in use has work at this moment."""
        held = self._current
        return held is not None and held.runtime.embedder.busy

    def give_up(self, release: str) -> None:
        """Lets go of a release that cannot be used here, until the alias has pointed elsewhere."""
        self._given_up = release
        if self.release == release:
            self._swap(None)

    def follow(self) -> None:
        """Looks where the alias points; on a move loads that release and swaps.

        A release that does not load leaves the old one in place: answers stay those of a known release.
        """
        wanted = self._wanted()
        if wanted != self._given_up:
            self._given_up = None
        if wanted is None:
            self._stay_without()
        elif wanted not in {self.release, self._given_up} and not self._recently_failed(wanted):
            self._take_over(wanted)

    def _stay_without(self) -> None:
        if self._required and not self._waiting_said:
            log.warning("waiting_for_release", hint="code-worker releases import DIR --promote")
            self._waiting_said = True
        if not self._required and (release := self.release) is not None:
            self._swap(None)
            log.info("release_out_of_use", alias=self._alias, release=release)

    def _take_over(self, wanted: str) -> None:
        if self._current is not None:
            # A fleet that loads at the same moment would stall together.
            time.sleep(jittered(_JITTER_S / 2, 1.0))
        began = time.monotonic()
        try:
            # Beside the release in use, which goes on judging: for this long there must be memory for two.
            runtime = self._load(wanted)
        except Exception as error:  # noqa: BLE001 - anything a device or a plugin raises: the release in use goes on, loading rests
            self._failed = (wanted, time.monotonic())
            self._refused = (wanted, str(error) if isinstance(error, CodeWorkerError) else type(error).__name__)
            details = {} if isinstance(error, CodeWorkerError) else {"exc_info": error}
            log.error(
                "release_load_failed",
                alias=self._alias,
                release=wanted,
                kept=self.release,
                error=str(error),
                **details,
            )
            return
        self._swap(runtime)
        self._refused = None
        log.info("release_in_use", alias=self._alias, release=wanted, seconds=round(time.monotonic() - began, 2))

    def _recently_failed(self, release: str) -> bool:
        return (
            self._failed is not None and self._failed[0] == release and time.monotonic() - self._failed[1] < _RETRY_S
        )

    def _swap(self, runtime: Runtime | None) -> None:
        with self._lock:
            old, self._current = self._current, None if runtime is None else _Held(runtime)
            close = False
            if old is not None:
                old.retired = True
                close = not old.users
        if old is not None and close:
            old.runtime.embedder.close()

    def close(self) -> None:
        """Retires the runtime in use."""
        with self._lock:
            old, self._current = self._current, None
        if old is not None:
            old.runtime.embedder.close()
