"""The worker's process, `python -m code_worker.stack.worker_process`, with a thread that samples its encoder."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import cast

from code_worker.encoder.loop import EncoderLoop
from code_worker.settings import Settings
from code_worker.stack import worker_process
from code_worker.wire import QUEUES, SWEEP_QUEUE
from code_worker.worker.app import create_app, host_of
from code_worker.worker.judging.node import Node

EVERY_S = 0.1


def sample(node: Node, path: Path) -> None:
    """Appends counters of the encoder loop, for ever."""
    while True:
        with node.runtimes.use() as runtime:
            if runtime is not None:
                loop = cast("EncoderLoop", runtime.embedder)
                stats = loop.stats()
                line = {"at": time.time(), "busy_s": stats.busy_s, "crops": stats.crops, "streams": loop.streams}
                with path.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
        time.sleep(EVERY_S)


def run(settings: Settings) -> int:
    """What the process does by itself, and the sampling."""
    app = create_app(settings)
    node = host_of(app).node()
    threading.Thread(target=sample, args=(node, Path(sys.argv[1])), daemon=True).start()
    return worker_process.consume(app, [*QUEUES, SWEEP_QUEUE], settings.worker.concurrency, settings, name="worker")


if __name__ == "__main__":
    sys.exit(worker_process.run_to_end(run))
