"""`python -m bench [PART…] [--quick] [--json FILE]`: every comparison, one after the other, and one file of figures.

Each part is a module that runs by itself as well, `python -m bench.PART`, with more to choose.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rounds import machine


@dataclass(frozen=True, slots=True)
class Part:
    """A module that takes `--json FILE`.

    Attributes:
        command: module and arguments.
        quick: further arguments for a run of seconds, which shows that it works and measures little.
    """

    command: tuple[str, ...]
    quick: tuple[str, ...] = ()


PARTS = {
    "pipeline": Part(("bench.pipeline",), ("--quick",)),
    "decoding": Part(("bench.decoding",), ("--quick",)),
    "servers": Part(("bench.servers",), ("--quick",)),
    "stack": Part(("bench.stack",), ("--quick",)),
    "forward": Part(("bench.forward",), ("--rounds", "1", "--seconds", "0.1", "--micro-batches", "4")),
    "intake": Part(("bench.ledger", "intake"), ("--references", "2000", "--rounds", "1", "--sizes", "1000")),
    "verdicts": Part(("bench.ledger", "verdicts"), ("--jobs", "500", "--rounds", "1")),
    "noop": Part(("bench.noop",), ("--images", "640", "--rounds", "1")),
    "growth": Part(("bench.growth",), ("--sizes", "1000", "--rounds", "2")),
    "labels": Part(("bench.labels",), ("--sizes", "1000", "--heads", "linear")),
    "heads": Part(("bench.heads",), ("--references", "3000", "--rounds", "1")),
    "training": Part(("bench.training",)),
}


def run(name: str, *, quick: bool) -> Any:
    """Figures of one part; what it prints is seen as it comes.

    Raises:
        subprocess.CalledProcessError: it failed, for instance because two contestants said different things.
    """
    part = PARTS[name]
    with tempfile.TemporaryDirectory() as directory:
        figures = Path(directory) / "figures.json"
        extra = part.quick if quick else ()
        command = [sys.executable, "-m", *part.command, *extra, "--json", str(figures)]
        subprocess.run(command, check=True)
        return json.loads(figures.read_text(encoding="utf-8"))


def main() -> None:
    """Runs the parts named on the command line, or all; exit status 1 when one failed, after the others ran."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, where a part has any")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    found: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "parts": {}}
    failed = []
    for name in chosen.parts or PARTS:
        print(f"== {name}", flush=True)
        try:
            found["parts"][name] = run(name, quick=chosen.quick)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name}: status {error.returncode}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
