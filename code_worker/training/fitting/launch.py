"""From a snapshot to a trained encoder: writes the job, runs the training process, reads the result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from code_worker.data.datasets.examples import FAKE, REAL
from code_worker.data.labelled_images import refuse_holdout
from code_worker.errors import DatasetError, StorageError, TrainingError
from code_worker.logs import get_logger, redact
from code_worker.releases.integrity import hash_file
from code_worker.releases.manifest import Preprocessing, encoder_digest
from code_worker.settings import TrainingSettings
from code_worker.store.learning import runs
from code_worker.training.fitting.job import FAILED_STATUS, JOB_FILE, Item, TrainingJob, write_job

if TYPE_CHECKING:
    from code_worker.encoder.weights import EncoderWeights
    from code_worker.releases.loading import LoadedRelease
    from code_worker.settings import Settings
    from code_worker.training.run_context import RunContext, RunDirectory, RunLease
    from code_worker.training.snapshot import Member, Snapshot

RESULT: Final = "result"
FAILURE: Final = "failure.json"
Progress = Callable[[Mapping[str, Any]], None]
"""Hears what `progress.json` says."""
_STARTS: Final = 3
_POLL_S: Final = 0.2
_STOP_S: Final = 60.0
_LOG_TAIL: Final = 600
_SUPERVISOR_ENV: Final = "CODE_WORKER_SUPERVISOR_PID"
log = get_logger(__name__)


def run_training_process(
    directory: Path, settings: Settings, held: RunLease, progress: Progress, *, lock: int
) -> None:
    """Trains in a process of its own until the result is written; one that dies unexplained is started again.

    It takes up its last checkpoint each time. Metrics go to the store as they come.

    Args:
        directory: of the job, see `training.job`.
        settings: how many processes, and how long at most.
        held: the run.
        progress: hears where it stands.
        lock: descriptor that each child holds open as long as it lives.

    Raises:
        TrainingError: it failed for the reason it gave, died too often, or took too long.
        RunLostError, RunStoppedError: see `Held.check`; the child was ended before.
    """
    deadline = time.monotonic() + settings.training.timeout_s
    for _ in range(_STARTS):
        if (directory / RESULT).is_dir():
            return
        status = _Watched(directory, settings, held, progress).run(deadline, lock)
        if (directory / RESULT).is_dir():
            return
        # torchrun hides its processes' status behind one of its own.
        if status == FAILED_STATUS or (directory / FAILURE).is_file():
            raise TrainingError(_reason(directory))
        log.warning("training_process_died", run=held.lease.run_id, status=status)
    raise TrainingError(f"the training process ended {_STARTS} times with status {status}: {_tail(directory)}")


class _Watched:
    """One life of the training process."""

    def __init__(self, directory: Path, settings: Settings, held: RunLease, progress: Progress) -> None:
        self._directory = directory
        self._settings = settings
        self._held = held
        self._progress = progress
        self._sent = 0

    def run(self, deadline: float, lock: int) -> int:
        """Exit status; negative: the signal."""
        with (self._directory / "train.log").open("ab") as output:
            process = subprocess.Popen(
                _command(self._directory, self._settings),
                env=_environment(self._settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock,),
                # Ctrl-C in a terminal reaches this process, which then ends the child in order.
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                self._held.check()
                self._look()
                if time.monotonic() > deadline:
                    raise TrainingError(
                        f"training took longer than {self._settings.training.timeout_s} s "
                        "(CODE_WORKER_TRAINING__TIMEOUT_S)"
                    )
                time.sleep(_POLL_S)
            self._look()
            return process.returncode
        finally:
            _end(process)

    def _look(self) -> None:
        if (said := _read_json(self._directory / "progress.json")) is not None:
            self._progress(said)
        measured = _metrics(self._directory / "metrics.jsonl")
        if len(measured) != self._sent:
            self._held.write(lambda session: runs.add_metrics(session, self._held.lease, measured))
            self._sent = len(measured)


def _command(directory: Path, settings: Settings) -> list[str]:
    train_here = ["-m", "code_worker.training.fitting.training_process", str(directory)]
    count = settings.training.processes
    if count > 1:
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        train_here = [*several, *train_here]
    # Tied to this process: it must not train on for nobody when this one is killed.
    return [sys.executable, "-m", "code_worker.system.processes", sys.executable, *train_here]


def _environment(settings: Settings) -> dict[str, str]:
    own = {"CODE_WORKER_DATA_DIR": str(settings.data_path), _SUPERVISOR_ENV: str(os.getpid())}
    if settings.plugins_dir is not None:
        own["CODE_WORKER_PLUGINS_DIR"] = str(settings.plugins_dir)
    return {**os.environ, **own}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks for a checkpoint and an end, and insists after a while."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _metrics(path: Path) -> list[runs.RunMetrics]:
    """Points of the curves; a line that is still being written is left for the next look."""
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                point = json.loads(line)
                found.append(runs.RunMetrics(point["epoch"], point["step"], point["metrics"]))
    return found


def _reason(directory: Path) -> str:
    failure = _read_json(directory / FAILURE)
    return str(failure["reason"]) if failure else f"training failed and could not say why: {_tail(directory)}"


def _tail(directory: Path) -> str:
    try:
        text = (directory / "train.log").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"no log ({error.strerror})"
    return redact(" ".join(text[-_LOG_TAIL:].split())) or "it said nothing"


_FEWEST_TO_CHOOSE = 10


@dataclass(frozen=True, slots=True)
class MissedGenerators:
    """Generators that the champion calls fake too rarely, and new ones that its encoder does not tell from reals."""

    missed: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()


def train_encoder(
    attempt: RunContext,
    taken: Snapshot,
    base: LoadedRelease | None,
    progress: Progress,
    missed: MissedGenerators,
) -> tuple[EncoderWeights, str]:
    """The trained encoder and its hash; what an earlier attempt left in the workplace is gone on with.

    Args:
        attempt: at the run.
        taken: what to learn from and to choose by.
        base: whose encoder to begin with.
        progress: hears of the training.
        missed: what to oversample.

    Raises:
        TrainingError, RunLostError, RunStoppedError: see `child.train`.
        DatasetError: too little of the snapshot can be read.
    """
    from code_worker.encoder.weights import read_weights

    place = attempt.place
    if not (place.job / JOB_FILE).is_file():
        write_training_job(attempt, taken, base, missed)
    run_training_process(place.job, attempt.settings, attempt.held, progress, lock=place.lock)
    weights = read_weights(place.job / RESULT)
    return weights, _digest(place, weights)


def write_training_job(
    attempt: RunContext, taken: Snapshot, base: LoadedRelease | None, missed: MissedGenerators
) -> None:
    """Makes the kept copies local and describes the training, complete or not at all.

    Raises:
        TrainingError: an image of the hold-out among those to learn from or to choose by, or a full disk.
        DatasetError: less than half of the images can be read.
    """
    parts = validation_parts(taken)
    learned, validation = (make_items(members, attempt, missed.missed) for members in parts)
    refuse_holdout([*learned, *validation])
    directory = attempt.place.job
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write_job(directory, _described(attempt, base, unseen=bool(missed.unseen)), learned, validation)
    except OSError as error:
        raise TrainingError(f"the training job cannot be written to {directory}: {error.strerror}") from error


def validation_parts(taken: Snapshot) -> tuple[list[Member], list[Member]]:
    """Returns what the encoder learns from, and what chooses its epoch and how far to go; neither is of the hold-out.

    Where the validation part has too few images of a class to choose by, it is at most an eighth of each class of the
    training share: whole groups, in the order of a hash of their names. One that is larger stays to be learned from.

    Raises:
        DatasetError: a class is in one group alone, or in few large ones.
    """
    counts = Counter(member.label for member in taken.validation)
    if all(counts[label] >= _FEWEST_TO_CHOOSE for label in (REAL, FAKE)):
        return taken.train, taken.validation
    share = taken.training_share
    wanted = {label: max(1, sum(member.label == label for member in share) // 8) for label in (REAL, FAKE)}
    groups: dict[str, list[Member]] = {}
    for member in share:
        groups.setdefault(member.group or member.sha256, []).append(member)
    chosen: set[str] = set()
    for key in sorted(groups, key=lambda name: hashlib.sha256(f"validation {name}".encode()).digest()):
        has = Counter(member.label for member in groups[key])
        if all(has[label] <= left for label, left in wanted.items()):
            chosen.add(key)
            wanted = {label: left - has[label] for label, left in wanted.items()}
    parts: tuple[list[Member], list[Member]] = ([], [])
    for member in share:
        parts[(member.group or member.sha256) in chosen].append(member)
    if any({member.label for member in part} != {REAL, FAKE} for part in parts):
        raise DatasetError(
            "too few groups of labelled images to train on some and choose by others: both parts need both classes, "
            "and images of one group stay together"
        )
    return parts


def _described(attempt: RunContext, base: LoadedRelease | None, *, unseen: bool) -> TrainingJob:
    from code_worker.encoder.weights import save_weights

    settings = TrainingSettings.model_validate(attempt.run.config["training"])
    initial = None
    if base is not None and not settings.from_scratch:
        initial = attempt.place.job / "initial"
        save_weights(base.weights, initial)
    return TrainingJob(
        name=f"run {attempt.run.id}",
        initial=None if initial is None else str(initial),
        encoder={} if base is None else asdict(base.weights.config),
        settings=settings,
        unseen=unseen,
        device=attempt.settings.device,
        # Pictures need an extra, and no training should end for the lack of it.
        picture_every=TrainingJob.model_fields["picture_every"].default if find_spec("matplotlib") else 0,
        limits=attempt.settings.limits,
    )


def make_items(members: Sequence[Member], attempt: RunContext, missed: frozenset[str]) -> list[Item]:
    """The members as local files; those of which the copy is gone or damaged are left out.

    Where generators are missed, what counts as new, and is drawn more often, is their images alone.

    Raises:
        StorageError: the storage cannot be read at all.
        DatasetError: less than half of them can be read.
    """

    def item(member: Member) -> Item | str:
        attempt.held.check()
        try:
            path = attempt.parts.kept.path(member.sha256)
        except StorageError:
            raise
        except DatasetError as error:
            return str(error)
        return Item(
            path=str(path),
            label=1 if member.label else 0,
            generator=member.generator,
            collection=member.collection,
            sha256=member.sha256,
            group=member.group,
            split=member.split,
            new=member.generator in missed if missed else member.new,
        )

    threads = attempt.settings.worker.fetch_threads
    with ThreadPoolExecutor(threads, thread_name_prefix="materialise") as pool:
        made = list(pool.map(item, members))
    items = [one for one in made if isinstance(one, Item)]
    problems = [one for one in made if isinstance(one, str)]
    if 2 * len(items) < len(members):
        raise DatasetError(
            f"{len(problems)} of {len(members)} labelled images cannot be read, one because: {problems[0]}"
        )
    if problems:
        log.warning("labelled_images_left_out", images=len(problems), one=problems[0])
    return items


def _digest(place: RunDirectory, weights: EncoderWeights) -> str:
    """Returns what a manifest will call this encoder, so that its embeddings are found again."""
    config = weights.config
    root = place.job / RESULT
    files = {f"encoder/{path.name}": hash_file(path) for path in sorted((root / "encoder").iterdir())}
    preprocessing = Preprocessing(crop=config.image_size, mean=config.mean, std=config.std)
    return encoder_digest(files, files, preprocessing)
