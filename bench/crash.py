"""Crashes: SIGKILL at random moments of runs; what the next trainer makes of each, and whether anything is broken.

    python -m bench.crash DIRECTORY [--kills 20] [--each 5] [--stages "train gate"] [--kind refit] [--json FILE]

A deployment of its own with a broker, a tiny champion and a labelled store. Each round asks for a run. As often as
`--each` says it waits a random while, kills the trainer and everything below it as a power cut would, and starts
another; with `--stages` one more run is killed once in each of these stages. Each round checks that the run ended by
its own, that no run was begun twice, and that the champion is a whole, verified release at every look between.
Exit status 1 when something was not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import psutil

from code_worker.errors import CodeWorkerError
from code_worker.plugins import load_plugins
from code_worker.publisher import Publisher
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.store import migrate
from code_worker.store.engine import Store, open_store
from code_worker.store.learning import runs
from code_worker.system.failpoints import FAILPOINT_ENV
from code_worker.wire import REFIT, RETRAIN, TRAIN_QUEUE
from tests.servers import RedisServer
from tests.training.learning import build_champion, label_world, promote_champion

QUICK = {
    "CODE_WORKER_DEVICE": "cpu",
    "CODE_WORKER_LOG_LEVEL": "warning",
    "CODE_WORKER_SCHEDULE__MIN_HOLDOUT": "8",
    # A hold-out of two dozen images proves little: without these no run would be promoted.
    "CODE_WORKER_GATE__MAX_REGRESSION": "0.3",
    "CODE_WORKER_GATE__ERROR": "0.2",
    "CODE_WORKER_TRAINING__EPOCHS": "3",
    "CODE_WORKER_TRAINING__STEPS_PER_EPOCH": "4",
    "CODE_WORKER_TRAINING__RECORDS": "8",
    "CODE_WORKER_TRAINING__LOADER_PROCESSES": "0",
    "CODE_WORKER_TRAINING__LEASE_S": "3",
    "OMP_NUM_THREADS": "1",
}
# A stage over before anybody sees it: there a trainer is made to stand still.
HELD = {"promote": "mid_run_promotion:hang"}
PATIENCE_S = 300.0
T = TypeVar("T")


class Trainers:
    """Starts trainers, and ends them as a power cut would."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, moment: str | float = "") -> None:
        """One trainer under its supervisor, which is to be killed in a stage or after some seconds."""
        environment = {**os.environ, FAILPOINT_ENV: HELD.get(str(moment), "")}
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "code_worker", "trainer"], env=environment, stdout=output, stderr=output
            )

    def kill(self) -> None:
        """Everything stands still before anything dies, so that nobody sees the other go."""
        if self.process is None:
            return
        everybody = [psutil.Process(self.process.pid)]
        everybody += everybody[0].children(recursive=True)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for each in everybody:
                if each.is_running():
                    each.send_signal(number)
        self.process.wait(10)
        psutil.wait_procs(everybody[1:], timeout=10)
        self.process = None

    close = kill


def main() -> None:
    """Runs the rounds and prints what became of each."""
    parser = argparse.ArgumentParser(prog="bench.crash")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--each", type=int, default=1, help="kills of one run, at most")
    parser.add_argument("--stages", default="", help="kill one more run, once in each of these stages in their order")
    parser.add_argument("--kind", choices=["retrain", "refit"], default="retrain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.directory.mkdir(parents=True, exist_ok=True)
    with RedisServer() as broker:
        os.environ.update(
            QUICK, CODE_WORKER_DATA_DIR=str(chosen.directory / "data"), CODE_WORKER_BROKER_URL=broker.url
        )
        settings = load_settings()
        with closing(open_store(settings.resolved_database_url)) as store:
            migrate.upgrade(store)
            label_world(settings, store)
            found = rounds(settings, store, chosen)
    print(f"killed in: {dict(Counter(stage for one in found for stage in one['killed_in']))}")
    print(f"ended as:  {dict(Counter(one['state'] for one in found))}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if any(one["problems"] for one in found):
        raise SystemExit("something was broken")


def rounds(settings: Settings, store: Store, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Kills and finishes so many runs."""
    rng, trainers = random.Random(chosen.seed), Trainers(chosen.directory / "log")
    found: list[dict[str, Any]] = []
    with closing(Publisher.for_producer(settings)) as publisher, closing(trainers):
        usual_s = measured_s(chosen.kind, settings, store, trainers, publisher)
        print(f"a {chosen.kind} takes {usual_s:.1f} s undisturbed", flush=True)
        for moments in plan(found, rng, usual_s, chosen):
            known = count(store)
            crown(settings, store, len(found) + 1)
            trainers.start(moments[0])
            ask(publisher, chosen.kind)
            began = wait_for(partial(newest, store, known))
            found.append({"round": len(found) + 1, **killed(settings, store, trainers, began.id, moments)})
            if (more := count(store)) != known + 1:
                found[-1]["problems"].append(f"{more - known} runs were begun")
            print(json.dumps(found[-1]), flush=True)
    return found


def plan(
    found: list[dict[str, Any]], rng: random.Random, usual_s: float, chosen: argparse.Namespace
) -> Iterator[list[str | float]]:
    """When to kill the next run: seconds after somebody took it up, or stages; `found` grows meanwhile."""
    while (left := chosen.kills - sum(len(one["killed_in"]) for one in found)) > 0:
        yield [rng.uniform(0, usual_s) for _ in range(min(left, chosen.each))]
    if stages := chosen.stages.split():
        yield stages


def crown(settings: Settings, store: Store, number: int) -> None:
    """Puts a champion in place that has something to learn, and whose reign has spent none of the gate's level."""
    directory = settings.data_path.parent / f"champion-{number}"
    promote_champion(settings, store, build_champion(directory, notes=f"round {number}"))


def killed(
    settings: Settings, store: Store, trainers: Trainers, run_id: str, moments: Sequence[str | float]
) -> dict[str, Any]:
    """Kills one trainer after another at these moments, and says what the last one makes of the run."""
    stages: list[str] = []
    problems: list[str] = []
    for moment, after in zip_longest(moments, moments[1:], fillvalue=""):
        if isinstance(moment, str):
            wait_for(partial(reached, store, run_id, moment))
        else:
            time.sleep(moment)
        trainers.kill()
        left = known_run(store, run_id)
        problems += broken(settings, store)
        stages.append("the end" if left.finished_at else str(left.stage))
        if left.finished_at:
            break
        trainers.start(after)
        wait_for(partial(taken_up, store, run_id, left.attempts))
    run = wait_for(partial(ended, store, run_id))
    trainers.kill()
    problems += broken(settings, store)
    if run.state not in {"promoted", "rejected"}:
        problems.append(f"it {run.state}: {run.reasons}")
    return {"killed_in": stages, "state": run.state, "attempts": run.attempts, "problems": problems}


def known_run(store: Store, run_id: str) -> runs.Run:
    """The run as it stands."""
    run = store.run(lambda session: runs.get(session, run_id), write=False)
    if run is None:
        raise SystemExit(f"run {run_id} is gone")
    return run


def taken_up(store: Store, run_id: str, attempts: int) -> runs.Run | None:
    """The run, once another process is at it, or has ended it."""
    run = known_run(store, run_id)
    return run if run.attempts > attempts or run.finished_at else None


def count(store: Store) -> int:
    """Runs that were ever begun."""
    return len(store.run(lambda session: runs.list_runs(session, limit=1000), write=False))


def measured_s(kind: str, settings: Settings, store: Store, trainers: Trainers, publisher: Publisher) -> float:
    """Seconds of an undisturbed run; kills come at any moment within them."""
    crown(settings, store, 0)
    trainers.start()
    ask(publisher, kind)
    first = wait_for(partial(newest, store, 0))
    run = wait_for(partial(ended, store, first.id))
    trainers.kill()
    if problems := broken(settings, store):
        raise SystemExit(str(problems))
    return (run.finished_at - run.created_at).total_seconds() if run.finished_at else 0.0


def ask(publisher: Publisher, kind: str) -> None:
    """As `code-worker retrain --force --enqueue`: every round has a run, whatever was learned before."""
    publisher.call({"retrain": RETRAIN, "refit": REFIT}[kind], TRAIN_QUEUE, arguments={"by": "bench", "force": True})


def newest(store: Store, known: int) -> runs.Run | None:
    """The last run, once there are more than so many."""
    found = store.run(lambda session: runs.list_runs(session, limit=1000), write=False)
    return found[0] if len(found) > known else None


def reached(store: Store, run_id: str, stage: str) -> runs.Run | None:
    """The run, once it is in this stage, or has ended before anybody saw it there."""
    run = known_run(store, run_id)
    return run if run.stage == stage or run.finished_at else None


def ended(store: Store, run_id: str) -> runs.Run | None:
    """The run, once it has ended."""
    run = known_run(store, run_id)
    return run if run.finished_at else None


def wait_for(look: Callable[[], T | None]) -> T:
    """The first thing that `look` finds."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(0.01)  # some stages are short
    raise SystemExit(f"nothing came of it in {PATIENCE_S} s")


def broken(settings: Settings, store: Store) -> list[str]:
    """What is wrong with the champion, in words."""
    registry = open_registry(settings, store=store, plugins=load_plugins(settings))
    try:
        registry.load_to_judge(str(registry.champion()))
    except CodeWorkerError as error:
        return [f"champion: {error}"]
    return []


if __name__ == "__main__":
    main()
