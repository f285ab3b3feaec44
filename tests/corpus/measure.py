"""How much memory a process needs for 64 bombs in one batch: `python -m tests.corpus.measure DIRECTORY`.

Prints by how many megabytes the process grew at most, how many were judged and how many refused. A process of its
own: the peak of one that has run other tests says nothing.
"""

from __future__ import annotations

import resource
import sys
from itertools import cycle, islice
from pathlib import Path

import psutil

from code_worker.moderation.judge import Judge
from code_worker.moderation.policy import PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.settings import LimitSettings
from code_worker.types import Job, Outcome
from tests.moderation.doubles import DictSources, runtime

PREFIXES = ("bomb_", "vast_", "header_", "directory_", "parts_jpeg_scans")
BATCH = 64


def bombs_in(directory: Path) -> list[bytes]:
    """64 different files: bytes behind the end of an image change nothing but its hash."""
    names = sorted(path for path in directory.iterdir() if path.name.startswith(PREFIXES))
    # Those that are decoded come again and again; of those refused by their header one each will do.
    vast = [path.read_bytes() for path in names if path.name.startswith("vast_")]
    others = [path.read_bytes() for path in names if not path.name.startswith("vast_")]
    chosen = [*others, *islice(cycle(vast), BATCH - len(others))]
    return [data + number.to_bytes(2, "big") for number, data in enumerate(chosen)]


def peak_bytes() -> int:
    """Most memory that this process has held; on Linux `getrusage` would count its parent's before it."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(directory: Path) -> None:
    """Judges the bombs as a worker with its default settings does."""
    bombs = bombs_in(directory)
    sources = DictSources({str(number): data for number, data in enumerate(bombs)})
    with PriorityPool(8) as pool:
        judge = Judge(sources=sources, pool=pool, limits=LimitSettings())
        good = {"good": (directory / "ok_jpeg").read_bytes(), "too": (directory / "ok_webp").read_bytes()}
        judge_of_good = Judge(sources=DictSources(good), pool=pool, limits=LimitSettings())
        judge_of_good.judge([Job(id=name, uri=name) for name in good], runtime(), PolicyBook())
        before = psutil.Process().memory_info().rss
        found = judge.judge([Job(id=uri, uri=uri) for uri in sources.objects], runtime(), PolicyBook())
    assert not found.faults, found.faults
    judged = sum(verdict.outcome is Outcome.JUDGED for verdict in found.verdicts)
    print((peak_bytes() - before) / 1e6, judged, len(found.verdicts) - judged)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
