"""The Celery side: app, tasks, transport, sweeper, embedded stack."""
