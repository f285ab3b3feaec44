"""Roles: labeller < reviewer < operator, by the names that the settings list."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from code_worker.errors import NotAllowedError
from code_worker.settings import RoleSettings

_EVERYBODY: Final = "*"


class Role(IntEnum):
    """A higher role may do all that a lower one may."""

    LABELLER = 1
    REVIEWER = 2
    OPERATOR = 3


def current_user() -> str:
    """Name of the user that this process runs as, or its number where it has none, as in many containers.

    Asked of the system, not of the environment: `LOGNAME` and `USER` say what their owner likes.
    """
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def role_of(roles: RoleSettings, actor: str) -> Role | None:
    """The highest role that lists the actor or `*`, or None; while no role lists anybody, all are operators."""
    # Highest first: the first that lists the actor is the answer.
    listed: dict[Role, Sequence[str]] = {
        Role.OPERATOR: roles.operators,
        Role.REVIEWER: roles.reviewers,
        Role.LABELLER: roles.labellers,
    }
    if not any(listed.values()):
        return Role.OPERATOR
    return next((role for role, names in listed.items() if actor in names or _EVERYBODY in names), None)


def require(roles: RoleSettings, actor: str, role: Role, doing: str) -> None:
    """Returns when the actor has the role or a higher one.

    Raises:
        NotAllowedError: they have not; nothing was done.
    """
    have = role_of(roles, actor)
    if have is None or have < role:
        standing = "no role" if have is None else f"the role {have.name.lower()}"
        raise NotAllowedError(
            f"{actor} has {standing} and may not {doing}: that takes the role {role.name.lower()} "
            f"(CODE_WORKER_ROLES__{role.name}S)"
        )
