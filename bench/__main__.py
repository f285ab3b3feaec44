"""`python -m bench`: every comparison, one after the other; each is a module that runs by itself as well."""

from __future__ import annotations

import runpy
import sys

PARTS = {"pipeline": "bench.pipeline", "knn": "bench.knn", "training": "bench.training"}


def main() -> None:
    """Runs the parts named on the command line, or all."""
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for part in chosen:
        print(f"== {part}", flush=True)
        sys.argv = [part]
        runpy.run_module(PARTS[part], run_name="__main__")


if __name__ == "__main__":
    main()
