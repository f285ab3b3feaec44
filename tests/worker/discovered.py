"""A module of tasks that `autodiscover_tasks` finds."""

from celery import shared_task


@shared_task(name="theirs.discovered")
def discovered() -> None:
    """Nothing."""
