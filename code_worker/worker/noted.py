"""Settings that decide about verdicts: noted in the audit by the first process that finds one changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from code_worker.roles import current_user
from code_worker.store import audit

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store

__all__ = ["note_settings"]

_SECTIONS: Final = ("schedule", "gate", "labels", "roles")


def note_settings(settings: Settings, store: Store) -> None:
    """Records each of schedule, gate, labels and roles that is not as it was recorded last.

    They live in files and environments, which the database does not see change; a process that starts does.
    """
    states = {name: getattr(settings, name).model_dump(mode="json") for name in _SECTIONS}

    def note(session: Session) -> None:
        for name, state in states.items():
            audit.note_state(session, actor=current_user(), subject=f"settings {name}", state=state)

    store.run(note)
