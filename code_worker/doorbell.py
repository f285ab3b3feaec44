"""Publishing: a message names jobs whose rows are in SQL already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError

from code_worker.broker import celery_config
from code_worker.errors import BrokerUnavailableError
from code_worker.queues import MODERATE, jobs_message

if TYPE_CHECKING:
    from code_worker.settings import Settings

__all__ = ["Doorbell"]


class Doorbell:
    """Rings for jobs; safe to share between threads."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    @classmethod
    def for_producer(cls, settings: Settings) -> Doorbell:
        """A doorbell for a process that runs no worker.

        Raises:
            ConfigurationError: no broker is configured.
        """
        app = Celery("code_worker.client", set_as_current=False, changes={})
        app.config_from_object(celery_config(settings))
        return cls(app)

    def ring(self, queue: str, job_ids: Sequence[str]) -> None:
        """Publishes one message that lists the jobs.

        Raises:
            BrokerUnavailableError: the broker did not take it in time.
        """
        try:
            self._app.send_task(MODERATE, args=(jobs_message(job_ids),), queue=queue, ignore_result=True)
        except (OperationalError, ConnectionError, TimeoutError) as error:
            raise BrokerUnavailableError(f"broker did not take the message: {error}") from error

    def depth(self, queue: str) -> int:
        """Messages that wait in a queue, those that a worker holds left out; a new queue is empty.

        Raises:
            BrokerUnavailableError: the broker did not answer in time.
        """
        try:
            with self._app.connection_for_read() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0.1)
                # Not passively: kombu looks for the key without its prefix then, and calls every queue unknown.
                return int(Queue(queue, channel=connection.default_channel).queue_declare().message_count)
        except (OperationalError, ConnectionError, TimeoutError) as error:
            raise BrokerUnavailableError(f"broker did not answer: {error}") from error

    def close(self) -> None:
        """Closes the connections."""
        self._app.close()
