"""The whole stack beside our own `scan`: what broker, ledger and claims cost.

    python -m bench.stack [--kind 640x480-jpeg] [--images 192] [--rounds 5] [--quick] [--json FILE]

One worker process with its usual settings takes jobs from a Redis-protocol server, reads images from an S3 endpoint
and writes verdicts and embeddings to PostgreSQL, all on loopback and on the same cores. Beside it `scan` in a process
of its own reads the same objects from the same endpoint, and, since the endpoint is a program in Python that takes
its share of the cores, once more the same images from files. Time runs from `enqueue_many` to the last verdict in
SQL. Labels must be equal in all runs, or the program fails.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.contestants import Contestant
from bench.deployment import deployed
from bench.images import Kind, make_images
from bench.pipeline import published_model
from bench.rounds import alternate, compared, print_table, rows_of, spread, write_json

BAR = 0.9
NAMES = ("stack", "scan from S3", "scan from files")
TITLES = ("images", "contestant", "images/s", "the stack is … times as fast", "bar")


def run(directory: Path, kind: Kind, images: int, rounds: int) -> dict[str, Any]:
    """Figures of the three.

    Raises:
        SystemExit: two of them say different things of one image.
    """
    paths = make_images(directory / str(kind), kind, images)
    model = published_model(directory)
    busy: list[float] = []
    with ExitStack() as stack:
        # It takes over the environment that points to the endpoint.
        deployment = stack.enter_context(deployed(directory, model))
        scan = stack.enter_context(Contestant("ours", model))
        uris = deployment.upload(paths)
        expected = scan.judge(uris)[1]

        def measure(name: str) -> float:
            if name == "stack":
                seconds, labels, share = deployment.judge(uris)
                busy.append(share)
            else:
                seconds, labels = scan.judge(uris if name == "scan from S3" else paths)
            if labels != expected:
                raise SystemExit(f"{name}: labels differ")
            return len(paths) / seconds

        measure("stack")
        busy.clear()
        rates = alternate(NAMES, rounds, measure)
    figures = compared(rates, "stack", {"scan from S3": BAR})
    return {"images": images, "rounds": rounds, "encoder_busy": spread(busy, 3), "contestants": figures}


def main() -> None:
    """Starts everything, runs the rounds, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", type=Kind.parse, default=Kind.parse("640x480-jpeg"))
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few images, two rounds")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    images, rounds = (32, 2) if chosen.quick else (chosen.images, chosen.rounds)
    with tempfile.TemporaryDirectory(prefix="code-worker-bench-") as temporary:
        found = run(Path(temporary), chosen.kind, images, rounds)
    print_table(TITLES, list(rows_of(f"{images} of {chosen.kind}", found["contestants"])))
    print(f"encoder busy while the stack judged: {found['encoder_busy']}")
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
