"""Ways to run a worker that would lose or repeat jobs, refused before it takes any."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import prepare_accept_content

from code_worker.broker import check_visibility, is_redis
from code_worker.errors import ConfigurationError
from code_worker.logs import get_logger

if TYPE_CHECKING:
    from code_worker.settings import Settings

__all__ = ["check_content", "refuse_to_start"]

log = get_logger(__name__)
_REMAP: Final = "REMAP_SIGTERM"
_KOMBUS_OWN_S: Final = 3600
_JSON: Final = "application/json"


def refuse_to_start(worker: Any, settings: Settings) -> None:
    """Ends the process with status 2 when the Celery worker is set up in a way that cannot be trusted.

    Celery swallows what a receiver of its signals raises, but not SystemExit.
    """
    try:
        _check_signals(worker)
        _check_visibility(worker.app, settings)
        check_content(worker.app)
    except ConfigurationError as error:
        log.critical("configuration_error", error=str(error))
        raise SystemExit(2) from error


def check_content(app: Any) -> None:
    """Refuses an app whose workers would not read our messages, which are JSON.

    Raises:
        ConfigurationError: its `accept_content` lists no JSON, or something that is not installed.
    """
    try:
        accepted = prepare_accept_content(app.conf.accept_content)
    except SerializerNotInstalled as error:
        raise ConfigurationError(f"accept_content of the app {app.main!r}: {error}") from error
    if accepted is not None and _JSON not in accepted:
        raise ConfigurationError(
            f"the app {app.main!r} accepts {', '.join(sorted(accepted)) or 'nothing'} and no JSON: its workers would "
            "refuse each message of ours; add 'json' to its accept_content"
        )


def _check_signals(worker: Any) -> None:
    # A name still, or what it stands for.
    pool = worker.pool_cls if isinstance(worker.pool_cls, str) else getattr(worker.pool_cls, "__module__", "")
    if "solo" in pool and (remapped := os.environ.get(_REMAP)):
        raise ConfigurationError(
            f"{_REMAP}={remapped} with the pool solo: the signal breaks into the task that runs, which is then "
            f"acknowledged and lost; unset {_REMAP} or use --pool threads"
        )


def _check_visibility(app: Any, settings: Settings) -> None:
    if is_redis(str(app.conf.broker_url or "")):
        options = app.conf.broker_transport_options or {}
        check_visibility(float(options.get("visibility_timeout", _KOMBUS_OWN_S)), settings)
