"""A worker of an app with our tasks that takes none of our queues: meant, or a forgotten `-Q`."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from code_worker.broker import driver_of
from code_worker.doorbell import Doorbell
from code_worker.errors import BrokerUnavailableError
from code_worker.logs import get_logger
from code_worker.queues import QUEUES
from code_worker.worker.background import Repeater

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Bystander"]

log = get_logger(__name__)
_EVERY_S: Final = 60.0
_HINT: Final = f"jobs are judged by workers that name our queues: -P threads -Q {','.join(QUEUES)},code_worker.sweep"


class Bystander:
    """Says that this worker takes no jobs of ours, and warns once when such wait and do not become fewer.

    It asks the broker alone: a worker of others' queues may reach no database of ours.
    """

    def __init__(self, app: Celery, *, every_s: float = _EVERY_S) -> None:
        self._app = app
        self._doorbell = Doorbell(app)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._waited: dict[str, int] = {}
        self._warned = self._noted = False
        self._repeater = Repeater("bystander", every_s, self.look)

    def start(self) -> None:
        """Says it, and looks from now on; other brokers than Redis are not asked."""
        log.info("queues_not_taken", queues=list(QUEUES), hint=_HINT)
        if driver_of(self._app) == "redis":
            self._repeater.start()

    def stop(self) -> None:
        """Looks no more."""
        self._repeater.stop()
        if self._noted:
            with suppress(BrokerUnavailableError):
                self._doorbell.note_bystander(self._name, gone=True)

    def look(self) -> None:
        """One look at the queues; warns of those that hold no fewer messages than at the last."""
        try:
            # For `doctor`, which sees this worker nowhere else.
            self._doorbell.note_bystander(self._name)
            self._noted = True
            if self._warned:
                return
            waiting = {queue: self._doorbell.depth(queue) for queue in QUEUES}
        except BrokerUnavailableError:
            # Celery says that itself.
            return
        left = {queue: waiting[queue] for queue, before in self._waited.items() if waiting[queue] >= before > 0}
        self._waited = waiting
        if left:
            self._warned = True
            log.warning("jobs_not_taken", waiting=left, hint=_HINT)
