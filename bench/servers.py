"""HTTP servers of the same model beside the whole stack: LitServe and plain FastAPI, asked by concurrent clients.

    python -m bench.servers [--kind 640x480-jpeg] [--images 192] [--clients 64] [--rounds 5] [--quick] [--json FILE]

Both serve transformers' ViTModel and scikit-learn's head over loopback HTTP on the same cores; the clients keep their
connections and post the images as they lie on disk. Ours is `bench.stack`: jobs through Redis, images from an S3
endpoint, verdicts in PostgreSQL. Labels must be equal in all runs, or the program fails.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.contestants import Judged
from bench.deployment import deployed
from bench.images import Kind, make_images
from bench.pipeline import published_model
from bench.rounds import alternate, compared, print_table, rows_of, write_json
from tests.servers import free_port

BARS = {"litserve": 1.4, "fastapi": 1.8}
"""The servers, each a module `bench.serving_NAME`, and what ours must reach beside it."""
TITLES = ("images", "contestant", "images/s", "ours is … times as fast", "bar")
_PATIENCE_S = 120.0


class Server:
    """A server's process and those it starts."""

    def __init__(self, name: str, model: Path) -> None:
        self._port = free_port()
        command = [sys.executable, "-m", f"bench.serving_{name}", str(model), str(self._port)]
        self._process = psutil.Popen(command, stdout=subprocess.DEVNULL)

    def await_ready(self, image: bytes) -> None:
        """Returns once it labels an image.

        Raises:
            SystemExit: it ended, or is not ready within two minutes.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self.judge([image], clients=1)
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"a server did not start: {error}") from error
                time.sleep(0.5)
            else:
                return

    def judge(self, images: Sequence[bytes], clients: int) -> Judged:
        """Seconds from the first request to the last answer, and the labels."""
        own = threading.local()

        def ask(data: bytes) -> int:
            if not hasattr(own, "connection"):
                own.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_PATIENCE_S)
            headers = {"Content-Type": "application/octet-stream"}
            own.connection.request("POST", "/predict", body=data, headers=headers)
            answer = own.connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {body[:200]!r}")
            return int(json.loads(body)["label"])

        with ThreadPoolExecutor(clients) as pool:
            began = time.perf_counter()
            labels = list(pool.map(ask, images))
            return time.perf_counter() - began, labels

    def close(self) -> None:
        """Ends it and the processes it started."""
        if self._process.poll() is not None:
            return
        everybody = [*self._process.children(recursive=True), self._process]
        for one in everybody:
            one.terminate()
        _, alive = psutil.wait_procs(everybody, timeout=10)
        for one in alive:
            one.kill()


@contextmanager
def serving(name: str, model: Path, image: bytes) -> Iterator[Server]:
    """A server that is ready."""
    server = Server(name, model)
    try:
        server.await_ready(image)
        yield server
    finally:
        server.close()


def run(directory: Path, kind: Kind, images: int, rounds: int, clients: int) -> dict[str, Any]:
    """Figures of ours and of each server.

    Raises:
        SystemExit: two of them say different things of one image.
    """
    paths = make_images(directory / str(kind), kind, images)
    data = [path.read_bytes() for path in paths]
    model = published_model(directory)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serving(name, model, data[0])) for name in BARS}
        deployment = stack.enter_context(deployed(directory, model))
        uris = deployment.upload(paths)
        expected = deployment.judge(uris)[1]

        def measure(name: str) -> float:
            seconds, labels = (
                deployment.judge(uris)[:2] if name == "ours" else servers[name].judge(data, clients=clients)
            )
            if labels != expected:
                raise SystemExit(f"{name}: labels differ")
            return len(paths) / seconds

        rates = alternate(["ours", *BARS], rounds, measure)
    return {"images": images, "clients": clients, "rounds": rounds, "contestants": compared(rates, "ours", BARS)}


def main() -> None:
    """Starts everything, runs the rounds, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", type=Kind.parse, default=Kind.parse("640x480-jpeg"))
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few images, two rounds")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    images, rounds = (32, 2) if chosen.quick else (chosen.images, chosen.rounds)
    with tempfile.TemporaryDirectory(prefix="code-worker-bench-") as temporary:
        found = run(Path(temporary), chosen.kind, images, rounds, chosen.clients)
    print_table(TITLES, list(rows_of(f"{images} of {chosen.kind}", found["contestants"])))
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
