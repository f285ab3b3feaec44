"""The tasks: short, carrying ids; all they know is in the ledger."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.exceptions import Reject

from code_worker.errors import CodeWorkerError, RunActiveError, RunStoppedError
from code_worker.logs import get_logger
from code_worker.system.failpoints import failpoint
from code_worker.wire import MODERATE, SWEEP, WATCH
from code_worker.worker.schedule import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery import Celery

    from code_worker.worker.app_state import AppState

log = get_logger(__name__)
_REST_S = 5.0
_LONG_S = 6 * 3600
"""Far beyond a batch, which the watchdog ends; a task without a limit gets that of the app. No longer than needed: a
pool of processes keeps a timer of each task for as long as its limit, also once the task is done."""
_NEVER_S = 10 * 366 * 86_400
"""For what learns, which may take days and comes seldom."""


class OwnTask(Task):
    """A task whose options are our own, no matter what an app that we are installed in sets for its tasks.

    Its limits of time would end trainings and batches, for which we have our own watchdog; its retries would
    acknowledge messages that are to be delivered again; its results would be kept for nobody.
    """

    abstract = True
    ignore_result = True
    store_errors_even_if_ignored = False
    track_started = False
    serializer = "json"
    rate_limit = 0
    priority = 0
    time_limit = soft_time_limit = _LONG_S
    acks_on_failure_or_timeout = acks_on_failure = acks_on_timeout = True
    retry_on_worker_lost = False

    @classmethod
    def annotate(cls) -> None:
        """Nothing: `task_annotations` are for the app's own tasks."""


def register_tasks(app: Celery, host: AppState) -> None:
    """Adds `code_worker.moderate` and `code_worker.sweep` to the app."""
    # Acknowledged once verdicts are committed. A message of a child that was killed
    # comes back; what makes it end is the count of attempts in SQL, since Celery
    # counts none (celery#9082). Not shared: other apps of the process have no host.
    options = {"base": OwnTask, "acks_late": True, "reject_on_worker_lost": True, "shared": False}
    waking = {**options, "bind": True, "Request": "code_worker.worker.kombu_redis:WakingRequest"}

    def moderate(task: Any, *args: Any, **kwargs: Any) -> None:
        from code_worker.worker.intake import judge_jobs, take_message  # not in producers that list tasks

        message = args[0] if len(args) == 1 and not kwargs else {"args": args, "kwargs": kwargs}
        try:
            # The id is the same in every delivery, and so are those of the jobs that the message brings along.
            job_ids = take_message(host.store(), message, str(task.request.id))
            node = host.node() if job_ids else None
        except Exception as error:
            # No ledger, or no node, for any reason: a device out of memory is no error of ours. The message may
            # carry jobs that have no row yet, and Celery acknowledges one whose task fails.
            raise _put_back(error) from error
        try:
            done = node is None or judge_jobs(node, job_ids)
        except CodeWorkerError as error:
            raise _put_back(error) from error
        if not done:
            # For any worker, on Redis at the end of its queue; what was judged of it is passed over there.
            raise Reject("the worker stops", requeue=True)
        failpoint("before_ack")

    def sweep() -> None:
        host.sweep()

    app.task(moderate, name=MODERATE, **waking)
    app.task(sweep, name=SWEEP, **options)


def _put_back(error: Exception) -> Reject:
    """Has the message delivered again, to any worker, and not too fast."""
    if isinstance(error, CodeWorkerError):
        log.error("message_put_back", error=str(error))
    else:
        log.error("message_put_back", error=type(error).__name__, exc_info=error)
    # On the pool's thread, whose slot stays taken meanwhile: this worker takes fewer messages while it cannot judge.
    time.sleep(_REST_S)
    return Reject(str(error), requeue=True)


def register_learning(app: Celery, host: AppState) -> None:
    """Adds `code_worker.retrain`, `code_worker.refit` and `code_worker.learning_watch` to the app.

    They are acknowledged before they begin: a run that dies with its process is found in the ledger, and a message
    that comes back hours later would start another.
    """
    limits = {"time_limit": _NEVER_S, "soft_time_limit": _NEVER_S}
    options = {"base": OwnTask, "acks_late": False, "reject_on_worker_lost": False, "shared": False, **limits}
    for kind, task in TASKS.items():
        app.task(_learning_task(kind, host), name=task, **options)

    def watch() -> None:
        _log_instead(lambda: host.learning().watch())

    app.task(watch, name=WATCH, **options)


def _learning_task(kind: str, host: AppState) -> Callable[..., None]:
    def learn(*, scheduled: bool = False, by: str = "task", **asked: Any) -> None:
        if scheduled:
            _log_instead(lambda: host.learning().on_schedule(kind))
        else:
            _log_instead(lambda: host.learning().now(kind, by=by, **asked))

    return learn


def _log_instead(work: Callable[[], None]) -> None:
    """A task's end says nothing to anybody; what our own errors say goes to the log."""
    try:
        work()
    except (RunActiveError, RunStoppedError) as error:
        log.info("learning_put_off", reason=str(error))
    except CodeWorkerError as error:
        log.error("learning_failed", error=str(error))
