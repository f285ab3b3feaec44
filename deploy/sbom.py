"""Writes the bill of materials of a lock: CycloneDX 1.6, the same bytes for the same lock."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Final
from uuid import NAMESPACE_URL, uuid5

ROOT: Final = Path(__file__).resolve().parent.parent
_PIN: Final = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;\\]+)(?: ; (?P<marker>[^\\]+?))? \\"
)
_HASH: Final = re.compile(r" +--hash=sha256:(?P<digest>[0-9a-f]{64})(?: \\)?")
_VERSION: Final = re.compile(r'__version__ = "(?P<version>[^"]+)"')


def components(lock: str) -> list[dict[str, Any]]:
    """One component for each pin, in the lock's order.

    Raises:
        ValueError: a line that is neither a pin nor a hash, or a pin without one.
    """
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lock.splitlines(), 1):
        if pin := _PIN.fullmatch(line):
            found.append(_component(pin["name"], pin["version"], pin["marker"]))
        elif (digest := _HASH.fullmatch(line)) and found:
            found[-1]["hashes"].append({"alg": "SHA-256", "content": digest["digest"]})
        else:
            raise ValueError(f"line {number} is neither a pin nor a hash: {line!r}")
    if bare := [component["purl"] for component in found if not component["hashes"]]:
        raise ValueError(f"without a hash: {', '.join(bare)}")
    return found


def _component(name: str, version: str, marker: str | None) -> dict[str, Any]:
    canonical = re.sub(r"[-_.]+", "-", name).lower()
    purl = f"pkg:pypi/{canonical}@{version}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": canonical,
        "version": version,
        "purl": purl,
        "hashes": [],
    }
    if marker:
        # Where it is installed at all; CycloneDX has no field for it.
        component["properties"] = [{"name": "python:marker", "value": marker}]
    return component


def bill(lock: str, version: str) -> dict[str, Any]:
    """The bill of materials of code_worker `version` with these pins."""
    listed = components(lock)
    root = f"pkg:pypi/code-worker@{version}"
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # Of the content: the same lock is the same document. CycloneDX asks for a time only if there is one to tell.
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, f'{root} {lock}')}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": "code-worker",
                "version": version,
                "purl": root,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": listed,
        # The lock is flat: which of them needs which is not in it.
        "dependencies": [{"ref": root, "dependsOn": sorted({component["bom-ref"] for component in listed})}],
    }


def own_version() -> str:
    """The version in this checkout.

    Raises:
        ValueError: the file has none.
    """
    text = (ROOT / "code_worker" / "_version.py").read_text(encoding="utf-8")
    if (match := _VERSION.search(text)) is None:
        raise ValueError("code_worker/_version.py names no version")
    return match["version"]


def main() -> int:
    """Writes to the file that is named, or to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements" / "worker.txt")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    made = bill(arguments.lock.read_text(encoding="utf-8"), own_version())
    text = json.dumps(made, indent=2) + "\n"
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
