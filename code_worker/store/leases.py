"""A role of the whole deployment, held by signs of life and proved in every transaction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Final, Self, TypeVar

from code_worker.errors import StoreError
from code_worker.logs import get_logger
from code_worker.store import workers
from code_worker.store.engine import Session, Store
from code_worker.system.machine import uptime_s

log = get_logger(__name__)
T = TypeVar("T")
LEASE_S: Final = 20.0
"""How long a holder that gives no sign of life keeps others out."""
_POLL_S: Final = 0.5


class RoleLostError(StoreError):
    """This process gave no sign of life for so long that another one took over."""


class RoleTakenError(StoreError):
    """Another process, which lives, has the role."""


class RoleLease:
    """A role that one process of the deployment plays at a time, for as long as a block lasts.

    A thread gives signs of life. A role that its holder did not give back, because it died, is taken over once they
    have been missing for the length of a lease; a holder that lives is not waited for. Once entered, the role is
    only ever renewed: a holder that slept while others took it and gave it back has lost it.

    Args:
        store: a migrated one.
        role: its name.
        doing: what its holder is doing, for people who are refused.
        owner: who plays it; no two leases have the same.
        wait_s: how long to wait for a holder that may be dead, at most.

    Raises:
        RoleTakenError: on entering: another process plays it.
    """

    def __init__(self, store: Store, role: str, owner: str, *, doing: str, wait_s: float) -> None:
        self._store = store
        self._role = role
        self._owner = owner
        self._doing = doing
        # The lease of a holder that died is over by then; a holder that lives is not waited for.
        self._wait_s = min(wait_s, 1.25 * LEASE_S)
        # Set by the heartbeat's thread, read by the one that works: a float that is replaced whole needs no lock.
        self._signed = 0.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        deadline, seen = time.monotonic() + self._wait_s, self._end()
        while not self._sign(workers.take_lease):
            until = self._end()
            # The end of a lease moves only while its holder lives, so there is no use in waiting longer.
            if time.monotonic() > deadline or (until is not None and seen is not None and until > seen):
                raise RoleTakenError(f"another process is {self._doing}: wait until it is done")
            time.sleep(_POLL_S)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"{self._role}-heartbeat", daemon=True)
        self._thread.start()
        return self

    def write(self, work: Callable[[Session], T]) -> T:
        """A unit of work that begins with a proof that the role is still ours.

        Raises:
            RoleLostError: it is not.
        """

        def fenced(session: Session) -> T:
            # This UPDATE locks the lease's row until commit: nobody
            # takes the role over between the proof and the work.
            if not workers.renew_lease(session, self._role, self._owner, LEASE_S):
                raise RoleLostError(f"another process took over: it is {self._doing} there, or did so meanwhile")
            return work(session)

        return self._store.run(fenced)

    def check(self) -> None:
        """Before what no transaction can fence, such as the deletion of a file.

        Asks the store only where no sign of life was given for half a lease: this process slept, or its machine.

        Raises:
            RoleLostError: the role is another process's, or was since.
        """
        if uptime_s() - self._signed > LEASE_S / 2:
            self.write(lambda _: None)

    def _end(self) -> datetime | None:
        return self._store.run(partial(workers.lease_end, name=self._role), write=False)

    def _sign(self, by: Callable[..., bool]) -> bool:
        # Read before: the lease begins when the store has it.
        now = uptime_s()
        signed = self._store.run(partial(by, name=self._role, owner=self._owner, ttl_s=LEASE_S))
        self._signed = now if signed else self._signed
        return signed

    def _beat(self) -> None:
        # Three signs of life may fail before anybody else takes the role.
        while not self._done.wait(LEASE_S / 4):
            try:
                if not self._sign(workers.renew_lease):
                    return
            except StoreError as error:
                log.warning("role_heartbeat_missed", role=self._role, error=str(error))
            except Exception as error:  # without this thread another process takes the role over
                log.critical("role_heartbeat_broken", role=self._role, exc_info=error)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            # No limit: a sign of life that is under way ends with the limits of its statement and of the retries.
            self._thread.join()
        try:
            self._store.run(partial(workers.drop_lease, name=self._role, owner=self._owner))
        except StoreError as error:
            # What the block did is done; the role is free once the lease lapses.
            log.warning("role_not_given_back", role=self._role, error=str(error))
