"""Labelling: the image is fetched, a copy is kept, and the statement names it by the hash of its bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker.data.kept_copies import KeptImages, open_kept
from code_worker.errors import DatasetError
from code_worker.images.decode import inspect
from code_worker.images.local_files import storable
from code_worker.images.phash import perceptual_hash
from code_worker.images.source import Sources
from code_worker.roles import Role, current_user, require
from code_worker.store import audit, jobs, verdicts
from code_worker.store.erasure import personal
from code_worker.store.learning import image_groups, kept_images, labels
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.label_rules import REVIEW
from code_worker.store.learning.labels import NewLabel
from code_worker.types import Labelled

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store

_HASH: Final = re.compile(r"[0-9a-fA-F]{64}")
_JOB: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_UNKNOWN: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class Found:
    """The image that somebody named, of which a copy is kept now; `uri` is where they said it is."""

    image: KeptImage
    uri: str
    job_id: str | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """Counts of labels that said something new, and images without one: they were erased meanwhile."""

    added: int
    erased: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LabelFile:
    """The file that labels were read from, for the audit: its name, and the hash of its bytes if that is known."""

    name: str
    sha256: str | None = None


class Labeller:
    """Finds and keeps images and records what is said of them; safe to share between threads.

    Args:
        settings: limits, allow-list and dataset storage.
        store: the ledger.
        sources: where images come from; unset: as the settings say.
        kept: dataset storage; unset: the one that the settings name.
    """

    def __init__(
        self, settings: Settings, store: Store, *, sources: Sources | None = None, kept: KeptImages | None = None
    ) -> None:
        self._limits = settings.limits
        self._roles = settings.roles
        self._store = store
        self._sources = sources or Sources(settings)
        self._kept = kept or open_kept(settings)

    def label(
        self,
        target: str,
        label: str,
        *,
        by: str | None = None,
        generator: str | None = None,
        collection: str | None = None,
        group: str | None = None,
        note: str = "",
        source: str = "api",
        at: datetime | None = None,
        actor: str | None = None,
    ) -> Labelled:
        """Says that an image is real or generated; when this returns, statement and copy are safe.

        Args:
            target: a URI or path, the id of a job, or the content hash of an image of which a copy is kept.
            label: `real` or `fake`.
            by: who says so; unset: the user that this process runs as.
            generator: what made a fake one, if known.
            collection: where the image came from, if known.
            group: record or post that the image belongs to; its images are learned from together, or not at all.
            note: free text.
            source: by which way it is said; `review` settles the image, which takes a reviewer.
            at: when it was said; unset: now.
            actor: who acts, if it is not who says so; to speak in somebody else's name takes a reviewer.

        Raises:
            ValueError: an argument that cannot be stored; nothing was fetched.
            NotAllowedError: the actor is no labeller, or none but a reviewer may do it; nothing was written.
            DatasetError: no such job, no copy of such a hash, or other bytes than the job judged; or job or image
                were erased meanwhile.
            ImageRejectedError: the image may not be read, is not there, or is no image.
            TransientError: its source failed; try again.
        """
        by = current_user() if by is None else by
        actor = by if actor is None else actor
        # Checked with a hash that stands in, so that nothing is fetched for what could not be stored.
        draft = NewLabel(
            sha256=_UNKNOWN,
            label=label,
            by=by,
            source=source,
            generator=generator,
            collection=collection,
            group=group,
            note=note,
            at=at,
        )
        if source == REVIEW:
            require(self._roles, actor, Role.REVIEWER, "settle what is contradicted")
        require(self._roles, actor, Role.LABELLER, "label")
        if actor != by:
            require(self._roles, actor, Role.REVIEWER, f"label in the name of {by}")
        found = self.find(target)
        new = replace(draft, sha256=found.image.sha256, uri=found.uri, job_id=found.job_id)
        recorded = self.record([new], actor=actor)
        if recorded.erased:
            raise erased_meanwhile(new.sha256)
        return Labelled(new.sha256, found.uri, recorded.added > 0)

    def find(self, target: str, *, sha256: str | None = None) -> Found:
        """The image that a target names; a copy of it is kept afterwards, and only what is not kept is fetched.

        Args:
            target: as for `label`.
            sha256: what the bytes at a URI must be.

        Raises:
            DatasetError, ImageRejectedError, TransientError: as `label`.
            StorageError: the copy cannot be written.
        """
        if _HASH.fullmatch(target):
            return self._copy(target.lower())
        if _JOB.fullmatch(target):
            return self._of_job(target)
        return self._at(absolute(target), sha256)

    def allow_import(self, actor: str) -> None:
        """Returns when the actor may import files of labels.

        Raises:
            NotAllowedError: they are no reviewer.
        """
        require(self._roles, actor, Role.REVIEWER, "import labels")

    def record(
        self,
        new: Sequence[NewLabel],
        rows: Mapping[str, str] | None = None,
        *,
        actor: str,
        file: LabelFile | None = None,
    ) -> Recorded:
        """Writes statements about images that `find` gave, and rows that were read, in one transaction.

        The images are put into their groups in it, too.

        Args:
            new: statements, in the order said.
            rows: keys of a file's rows and the content hashes they turned out to mean.
            actor: who acts, for the audit.
            file: the file that they are from.

        Returns:
            How many statements said something new; and of which images nothing was written.
        """
        tries: list[Recorded] = []

        def write(session: Session) -> None:
            there = personal.left(
                session, jobs=(one.job_id for one in new if one.job_id), images=(one.sha256 for one in new)
            )
            # `find` noted it: without that row the copy goes, or is gone.
            kept = kept_images.kept(session, there.images)
            some = [one for one in new if one.sha256 in kept and (one.job_id is None or one.job_id in there.jobs)]
            written = {one.sha256 for one in some}
            # Locks in the order of all who forget: the erasure's (`left`), that of groups, the audit's.
            image_groups.lock(session)
            added = labels.add(session, some)
            image_groups.place(session, _named(some))
            labels.note_imported(session, {key: one for key, one in (rows or {}).items() if one in written})
            if added:
                _audit(session, some, added, actor, file)
            tries.append(Recorded(added, frozenset(one.sha256 for one in new) - written))

        self._store.run(write)
        # A try whose commit's answer was lost did add them, and the next one found nothing new.
        return replace(tries[-1], added=max(one.added for one in tries))

    def imported(self, keys: Sequence[str]) -> dict[str, str]:
        """Content hashes of the images of rows that were read before, by the row's key."""
        return self._store.run(lambda session: labels.imported(session, keys), write=False)

    def close(self) -> None:
        """Closes the connections to sources; a later call opens new ones."""
        self._sources.close()

    def _copy(self, sha256: str) -> Found:
        if (image := self._known(sha256, sha256, self._moment())) is None:
            raise DatasetError(f"no copy of image {sha256} is kept: label it by its URI or by a job that judged it")
        return Found(image, image.uri)

    def _of_job(self, job_id: str) -> Found:
        # Before anything is read: what is erased from here on is not brought back by this label.
        since = self._moment()
        verdict, job = self._store.run(
            lambda session: (verdicts.live(session, job_id), jobs.get(session, job_id)), write=False
        )
        if job is None:
            raise DatasetError(f"no job has the id {job_id}; a file of that name is written ./{job_id}")
        found = self._at(job.uri, verdict.sha256 if verdict else None, since=since, job_id=job.id)
        return replace(found, job_id=job.id)

    def _at(self, uri: str, sha256: str | None, *, since: datetime | None = None, job_id: str | None = None) -> Found:
        since = since or self._moment()
        if sha256 is not None and (image := self._known(sha256, uri, since, job_id)) is not None:
            return Found(image, uri)
        data = self._sources.fetch(uri).data
        image = self._inspected(data, uri)
        if sha256 is not None and image.sha256 != sha256:
            raise DatasetError(
                f"{uri} holds other bytes now ({image.sha256}) than those meant ({sha256}), of which no copy is "
                "kept: label the URI itself to speak of what is there now"
            )
        self._note(image, since, job_id)
        # Noted before it is written and looked at after it: a crash,
        # or an erasure in between, leaves no file without a row.
        self._kept.put(data)
        self._look_again(image.sha256)
        return Found(image, uri)

    def _known(self, sha256: str, uri: str, since: datetime, job_id: str | None = None) -> KeptImage | None:
        """The image, if a copy of it is kept; None where it must be fetched."""
        if not self._kept.exists(sha256):
            return None
        noted = self._store.run(partial(kept_images.kept, hashes=[sha256]), write=False).get(sha256)
        # A copy without a row: a storage may be older than the database, or shared with another one.
        image = noted or self._inspected(self._kept.read(sha256), uri)
        self._note(image, since, job_id)
        # Asked again once it is noted: from here on nobody deletes it.
        return image if self._kept.exists(sha256) else None

    def _note(self, image: KeptImage, since: datetime, job_id: str | None) -> None:
        """Before the copy is written: what becomes of the labeller, a row leads to it."""

        def note(session: Session) -> bool:
            if job_id is not None and not personal.left(session, jobs=[job_id]).jobs:
                return False
            return bool(kept_images.note_kept(session, [image], since=since))

        if not self._store.run(note):
            raise erased_meanwhile(image.sha256)

    def _look_again(self, sha256: str) -> None:
        """After the copy is written: an erasure that took its row since may have looked for the file too early."""
        if self._store.run(partial(kept_images.kept, hashes=[sha256]), write=False):
            return
        if self._store.run(partial(kept_images.drop_unnoted, sha256=sha256)):
            raise erased_meanwhile(sha256)

    def _moment(self) -> datetime:
        return self._store.look(personal.moment)

    def _inspected(self, data: bytes, uri: str) -> KeptImage:
        facts = inspect(data, self._limits)
        phash = kept_images.bits(perceptual_hash(data, self._limits))
        return KeptImage(facts.sha256, facts.size_bytes, facts.format, facts.width, facts.height, uri, phash)


def erased_meanwhile(sha256: str) -> DatasetError:
    """Returns why nothing was said of an image."""
    return DatasetError(
        f"image {sha256} or the job that judged it was erased while it was being labelled, or its copy is just being "
        "deleted: nothing was written; what is still there can be labelled again in a minute"
    )


def absolute(target: str) -> str:
    """A URI as it is; a path independent of this process's directory, as a URI where its name is no text."""
    if "://" in target or target.startswith("file:"):
        return target
    return storable(str(Path(target).absolute()))


def _named(new: Sequence[NewLabel]) -> dict[str, str | None]:
    """Content hashes in the order said, and the first name of a group that was given for each."""
    named: dict[str, str | None] = {}
    for one in new:
        named[one.sha256] = named.get(one.sha256) or one.group
    return named


def _audit(session: Session, new: Sequence[NewLabel], added: int, actor: str, file: LabelFile | None) -> None:
    """One entry for what one transaction wrote; it names statements by id, never the images."""
    if file is None:
        for one in new:
            details = {"label": one.label, "generator": one.generator, "by": one.by, "source": one.source}
            action = "label.settle" if one.source == REVIEW else "label.add"
            audit.record(session, actor=actor, action=action, subject=f"label {one.id}", details=details)
        return
    read = {"sha256": file.sha256, "rows": len(new), "added": added, **Counter(one.label for one in new)}
    audit.record(session, actor=actor, action="label.import", subject=f"file {file.name}", details=read)
