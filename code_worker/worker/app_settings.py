"""Settings of ours that stand in the configuration of somebody's app, as `app.conf.code_worker`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from celery.app.defaults import SETTING_KEYS

from code_worker.errors import ConfigurationError
from code_worker.logs import get_logger
from code_worker.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["settings_in", "warn_of_idle"]

log = get_logger(__name__)
_CONF: Final = "code_worker"
_OPTIONS: Final = "app.conf.broker_transport_options"
_THEIRS: Final = {
    ("broker_url",): "app.conf.broker_url",
    ("broker", "key_prefix"): f"{_OPTIONS}['global_keyprefix']",
    ("broker", "visibility_timeout_s"): f"{_OPTIONS}['visibility_timeout']",
    ("broker", "socket_timeout_s"): f"{_OPTIONS}['socket_timeout']",
}
"""Settings of our own app that are, in somebody's, Celery's to say."""


def settings_in(app: Celery) -> dict[str, Any] | None:
    """A copy of the mapping as it is now, so that changes within it are seen as such; None where there is none.

    Raises:
        ConfigurationError: it is no mapping, or names a setting of Celery's.
    """
    found = app.conf.get(_CONF)
    # A configuration that is a module may have imported us, and would have our name.
    if found is None or isinstance(found, ModuleType):
        return None
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"`code_worker` in the configuration of the app {app.main!r} must be a mapping of settings, "
            f"not {type(found).__name__}"
        )
    if misplaced := [f"{name} (set app.conf.{celerys})" for name, celerys in _of_celery(found)]:
        raise ConfigurationError(
            f"settings of Celery's, and not of ours, in app.conf.code_worker: {', '.join(misplaced)}"
        )
    return {name: _copied(value) for name, value in found.items()}


def _of_celery(found: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for name in map(str, found):
        celerys = name.lower().removeprefix("celery_")
        if celerys in SETTING_KEYS and name not in Settings.model_fields:
            yield name, celerys


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value


def warn_of_idle(found: Mapping[str, Any]) -> None:
    """Warns of each setting of that mapping that changes nothing in somebody's app, and says where it belongs."""
    for names, place in _THEIRS.items():
        section: Any = found
        for name in names[:-1]:
            section = section.get(name)
        if isinstance(section, Mapping) and names[-1] in section:
            log.warning(
                "setting_without_effect",
                setting=f"{'.'.join(names)} in app.conf.code_worker",
                hint=f"the broker is your app's: set {place}",
            )
