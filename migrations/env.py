"""Alembic's way in; `code_worker.store.migrate` hands over an open connection, inside its transaction."""

from __future__ import annotations

from alembic import context

from code_worker.store.migrate import VERSION_TABLE
from code_worker.store.models import Base


def run() -> None:
    connection = context.config.attributes.get("connection")
    if context.is_offline_mode():
        context.configure(
            url=context.config.attributes["url"],
            target_metadata=Base.metadata,
            version_table=VERSION_TABLE,
            literal_binds=True,
            transactional_ddl=True,
        )
    else:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            version_table=VERSION_TABLE,
            render_as_batch=True,
            transactional_ddl=True,
        )
    with context.begin_transaction():
        context.run_migrations()


run()
