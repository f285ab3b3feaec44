"""JSON schema of the part of the Compose specification that the files in deploy/ use; anything else is an error."""

from __future__ import annotations

from typing import Any

_STRINGS: dict[str, Any] = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_DURATION: dict[str, Any] = {"type": "string", "pattern": r"^(\d+(us|ms|s|m|h))+$"}
_COMMAND: dict[str, Any] = {"oneOf": [{"type": "string"}, _STRINGS]}
_TEXT_MAP: dict[str, Any] = {"type": "object", "additionalProperties": {"type": ["string", "number", "null"]}}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_HEALTHCHECK = {
    "oneOf": [
        _closed({"disable": {"const": True}}, "disable"),
        _closed(
            {
                "test": {
                    "type": "array",
                    "minItems": 2,
                    "items": {"type": "string"},
                    "prefixItems": [{"enum": ["CMD", "CMD-SHELL"]}],
                },
                "interval": _DURATION,
                "timeout": _DURATION,
                "start_period": _DURATION,
                "retries": {"type": "integer", "minimum": 1},
            },
            "test",
        ),
    ]
}
_DEPENDS_ON = {
    "type": "object",
    "additionalProperties": _closed(
        {"condition": {"enum": ["service_started", "service_healthy", "service_completed_successfully"]}}, "condition"
    ),
}
_DEVICE = _closed(
    {"driver": {"type": "string"}, "count": {"type": ["integer", "string"]}, "capabilities": _STRINGS}, "capabilities"
)
_SERVICE = _closed(
    {
        "image": {"type": "string", "pattern": r"^[a-z0-9./-]+:[A-Za-z0-9._-]+$"},
        "build": _closed({key: {"type": "string"} for key in ("context", "dockerfile", "target")}),
        "command": _COMMAND,
        "entrypoint": _COMMAND,
        "environment": _TEXT_MAP,
        "env_file": _STRINGS,
        "volumes": {"type": "array", "items": {"type": "string", "pattern": r"^[a-z]+:/[\w/]+$"}},
        "tmpfs": _STRINGS,
        "healthcheck": _HEALTHCHECK,
        "depends_on": _DEPENDS_ON,
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": _DURATION,
        "init": {"type": "boolean"},
        "read_only": {"type": "boolean"},
        "cap_drop": _STRINGS,
        "security_opt": _STRINGS,
        "deploy": _closed(
            {"resources": _closed({"reservations": _closed({"devices": {"type": "array", "items": _DEVICE}})})}
        ),
    }
)
COMPOSE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "services": {"type": "object", "minProperties": 1, "additionalProperties": _SERVICE},
        "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
    },
    "patternProperties": {"^x-": {}},
    "required": ["services"],
    "additionalProperties": False,
}
