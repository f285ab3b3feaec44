"""The SQL ledger: the only place that knows tables."""

import logging

# Alembic names its own plugins, at its import, in the log of anyone who imports us.
logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
