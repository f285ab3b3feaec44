"""Structured logging: JSON for machines, readable lines for a terminal, secrets out of both."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, MutableMapping
from types import TracebackType
from typing import Any, Final

import structlog

from code_worker.system.terminal import printable, printable_lines

_OF_LINES = frozenset({"exception", "stack"})
_SECRETS = (
    # What comes before keeps the search linear: a message of somebody's may be megabytes of letters.
    # A password may hold what it should not, of a URL of somebody's that is quoted before anybody reads it.
    # Commas, semicolons and quotes may end it; where no @ comes before them, they are in it.
    re.compile(
        r"(?<![a-zA-Z0-9+.\-])(?P<keep>[a-zA-Z0-9+.\-]+://[^\s/:@]*:)"
        r"(?:[^\s,;\"']{1,200}|(?:(?!://)\S){1,200}|[^\s/@]+)(?=@)"
    ),
    re.compile(
        r"(?P<keep>\b(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId)=)[^&\s\"']+",
        re.IGNORECASE,
    ),
)


def redact(text: str) -> str:
    """Blanks passwords in URLs and the signing parts of presigned ones."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<keep>***", text)
    return text


def _redact_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = redact(value)
    return event


def _printable_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """For a terminal: a traceback keeps its lines, all else stands on one."""
    for name, value in event.items():
        text = value if isinstance(value, str) else str(value)
        event[name] = (printable_lines if name in _OF_LINES else printable)(text)
    return event


_SHARED: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
    _redact_event,
]


class _Event(dict[str, Any]):
    """An event as the message of a log record: structured for our own formatter, one line for anybody else's."""

    _SAID_BY_THE_RECORD = frozenset({"event", "exception", "level", "logger", "timestamp"})

    def __str__(self) -> str:
        """`event key=value …`, and the traceback below it."""
        facts = (f"{name}={_shown(value)}" for name, value in self.items() if name not in self._SAID_BY_THE_RECORD)
        line = " ".join([str(self.get("event", "")), *facts])
        return f"{line}\n{self['exception']}" if "exception" in self else line


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if text.isprintable() and " " not in text else repr(value)


def _as_message(
    logger: Any, name: str, event: MutableMapping[str, Any]
) -> tuple[tuple[MutableMapping[str, Any]], dict[str, Any]]:
    (message,), facts = structlog.stdlib.ProcessorFormatter.wrap_for_formatter(logger, name, event)
    # The traceback is in the event: of `exception` the record would hold it a second time.
    return (_Event(message),), {**facts, "exc_info": False}


def configure_logging(level: str = "info", form: str = "auto") -> None:
    """Sends every record of this process, Celery's included, to stderr in one form."""
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "json"
    last: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    shown = [] if form == "json" else [_printable_event]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _redact_event, *shown, last],
        )
    )
    logging.captureWarnings(capture=True)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Of strangers' files: a directory of thousands of wrong entries would write as many lines.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for noisy in ("alembic", "botocore", "urllib3", "kombu", "amqp", "PIL"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def log_uncaught() -> None:
    """From now on what nobody catches in this process, on any thread, is a record like all others.

    Python's own way writes a traceback of many lines between those of a log that machines read.
    """
    log = get_logger(__name__)

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Ctrl-C is an end that somebody asked for, and no error of the program.
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            log.critical("uncaught_error", exc_info=(kind, error, trace))

    def on_thread(raised: threading.ExceptHookArgs) -> None:
        if raised.exc_value is not None and not isinstance(raised.exc_value, SystemExit):
            uncaught(raised.exc_type, raised.exc_value, raised.exc_traceback)

    sys.excepthook = uncaught
    threading.excepthook = on_thread


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Logger whose events are static snake_case names with data as keywords.

    It writes through the standard library's `logging`, whether or not `configure_logging` was called: in a producer's
    process, or a worker of somebody's app, they decide where lines go and how they look; see `_Event`.
    """
    processors = [
        structlog.stdlib.filter_by_level,
        *_SHARED,
        _as_message,
    ]
    wrapped: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=processors,
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return wrapped


class Repeats:
    """Tells what was said lately, so that a fault of every job is not a line of every job. Safe between threads."""

    _KINDS: Final = 256

    def __init__(self, every_s: float = 60.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        # In the order in which kinds came last, since each is taken out and put in again; guarded by `_lock`.
        self._said: dict[Hashable, tuple[float, int]] = {}

    def due(self, kind: Hashable) -> int | None:
        """Returns how often this kind came since it was last said, if it is to be said now; else None."""
        with self._lock:
            now = self._clock()
            at, passed_over = self._said.pop(kind, (None, 0))
            if at is not None and now - at < self._every_s:
                self._said[kind] = (at, passed_over + 1)
                return None
            if len(self._said) >= self._KINDS:
                # The one that came longest ago: kinds may be made
                # of names of strangers, and must not fill the memory.
                del self._said[next(iter(self._said))]
            self._said[kind] = (now, 0)
            return passed_over
