"""From a snapshot to a trained encoder: writes the job, has it trained, reads the result."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from code_worker.data.examples import FAKE, REAL
from code_worker.data.holdout import refuse_holdout
from code_worker.errors import DatasetError, StorageError, TrainingError
from code_worker.logs import get_logger
from code_worker.releases.hashing import hash_file
from code_worker.releases.manifest import Preprocessing, encoder_digest
from code_worker.settings import TrainingSettings
from code_worker.training.child import RESULT, Progress, train
from code_worker.training.job import JOB_FILE, Item, TrainingJob, write_job

if TYPE_CHECKING:
    from code_worker.encoder.weights import EncoderWeights
    from code_worker.releases.loading import LoadedRelease
    from code_worker.training.attempt import Attempt
    from code_worker.training.snapshot import Member, Snapshot
    from code_worker.training.workplace import Workplace

__all__ = ["Lacks", "make_items", "train_encoder", "validation_parts", "write_training_job"]

log = get_logger(__name__)
_FEWEST_TO_CHOOSE = 10


@dataclass(frozen=True, slots=True)
class Lacks:
    """Generators that the champion calls fake too rarely, and new ones that its encoder does not tell from reals."""

    missed: frozenset[str] = frozenset()
    unseen: frozenset[str] = frozenset()


def train_encoder(
    attempt: Attempt,
    taken: Snapshot,
    base: LoadedRelease | None,
    progress: Progress,
    lacks: Lacks,
) -> tuple[EncoderWeights, str]:
    """The trained encoder and its hash; what an earlier attempt left in the workplace is gone on with.

    Args:
        attempt: at the run.
        taken: what to learn from and to choose by.
        base: whose encoder to begin with.
        progress: hears of the training.
        lacks: what to dwell on.

    Raises:
        TrainingError, RunLostError, RunStoppedError: see `child.train`.
        DatasetError: too little of the snapshot can be read.
    """
    from code_worker.encoder.weights import read_weights

    place = attempt.place
    if not (place.job / JOB_FILE).is_file():
        write_training_job(attempt, taken, base, lacks)
    train(place.job, attempt.settings, attempt.held, progress, lock=place.lock)
    weights = read_weights(place.job / RESULT)
    return weights, _digest(place, weights)


def write_training_job(attempt: Attempt, taken: Snapshot, base: LoadedRelease | None, lacks: Lacks) -> None:
    """Makes the kept copies local and describes the training, complete or not at all.

    Raises:
        TrainingError: an image of the hold-out among those to learn from or to choose by, or a full disk.
        DatasetError: less than half of the images can be read.
    """
    parts = validation_parts(taken)
    learned, validation = (make_items(members, attempt, lacks.missed) for members in parts)
    refuse_holdout([*learned, *validation])
    directory = attempt.place.job
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write_job(directory, _described(attempt, base, blind=bool(lacks.unseen)), learned, validation)
    except OSError as error:
        raise TrainingError(f"the training job cannot be written to {directory}: {error.strerror}") from error


def validation_parts(taken: Snapshot) -> tuple[list[Member], list[Member]]:
    """What the encoder learns from, and what chooses its epoch and how far to go; neither is of the hold-out.

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


def _described(attempt: Attempt, base: LoadedRelease | None, *, blind: bool) -> TrainingJob:
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
        blind=blind,
        device=attempt.settings.device,
        # Pictures need an extra, and no training should end for the lack of it.
        picture_every=TrainingJob.model_fields["picture_every"].default if find_spec("matplotlib") else 0,
        limits=attempt.settings.limits,
    )


def make_items(members: Sequence[Member], attempt: Attempt, missed: frozenset[str]) -> list[Item]:
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


def _digest(place: Workplace, weights: EncoderWeights) -> str:
    """What a manifest will call this encoder, so that its embeddings are found again."""
    config = weights.config
    root = place.job / RESULT
    files = {f"encoder/{path.name}": hash_file(path) for path in sorted((root / "encoder").iterdir())}
    preprocessing = Preprocessing(crop=config.image_size, mean=config.mean, std=config.std)
    return encoder_digest(files, files, preprocessing)
