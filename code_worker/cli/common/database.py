"""The database, as commands open it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from code_worker.errors import ConfigurationError
from code_worker.logs import configure_logging
from code_worker.settings import Settings, load_settings
from code_worker.system.files import forbidden

if TYPE_CHECKING:
    from code_worker.store.engine import Store


def quiet_settings() -> Settings:
    """The settings of a command that prints an answer: of its log only warnings reach stderr."""
    settings = load_settings()
    configure_logging("error" if settings.log_level == "error" else "warning", settings.log_format)
    return settings


def has_database(settings: Settings) -> bool:
    """False while the file of a SQLite database is not there; a database server is taken to have one.

    Raises:
        ConfigurationError: this user may not look into its directory.
    """
    if (file := settings.database_file) is None:
        return True
    try:
        return file.is_file()
    except PermissionError:
        raise ConfigurationError(forbidden(file)) from None


def missing_database(settings: Settings) -> str:
    """Returns where there is no database."""
    where = f"in {settings.data_path}" if settings.database_url is None else f"at {settings.database_file}"
    return f"no database {where}"


def no_database(settings: Settings) -> str:
    """Returns that there is no database where the settings say, and what to do."""
    return (
        f"{missing_database(settings)}: start `code-worker up`, run `code-worker db upgrade`, "
        "or name another with CODE_WORKER_DATA_DIR or CODE_WORKER_DATABASE_URL"
    )


@contextmanager
def open_ledger(settings: Settings | None = None) -> Iterator[Store]:
    """The store that the settings name, migrated.

    Raises:
        ConfigurationError: there is none yet.
        StoreError: it is of another version.
    """
    from code_worker.store import migrate

    settings = settings or quiet_settings()
    if not has_database(settings):
        raise ConfigurationError(no_database(settings))
    with closing(migrate.open_current(settings.resolved_database_url)) as store:
        yield store
