"""The registry of releases: the store's rows and the artifact store's files, kept in step; which one is live."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from code_worker.errors import ArtifactError, IntegrityError, NoReleaseError, UnknownHeadError
from code_worker.logs import get_logger
from code_worker.releases.artifacts import ArtifactStore, open_artifacts
from code_worker.releases.building import build_from_parts, without_head
from code_worker.releases.importing import ImportOptions, build_release
from code_worker.releases.integrity import check, sign
from code_worker.releases.loading import IfChanged, LoadedRelease, load_release
from code_worker.releases.manifest import MANIFEST_NAME, essence, read_manifest, release_id, verify_files
from code_worker.releases.promotion import explained
from code_worker.roles import Role, current_user, require
from code_worker.settings import RoleSettings
from code_worker.store import releases
from code_worker.store.learning import snapshots
from code_worker.store.releases import CHALLENGER, CHAMPION, Registered
from code_worker.system.failpoints import failpoint

if TYPE_CHECKING:
    from pydantic import SecretStr

    from code_worker.plugins import Plugins
    from code_worker.releases.integrity import OnBytes
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store

log = get_logger(__name__)


class Registry:
    """Imports, loads and promotes releases. Safe to share between threads.

    What changes which release judges, or could, takes an operator: methods raise NotAllowedError for others. What a
    run adds and promotes is under the authority of the person who started or scheduled it.
    """

    def __init__(
        self,
        store: Store,
        artifacts: ArtifactStore,
        plugins: Plugins,
        roles: RoleSettings,
        keys: Sequence[SecretStr] = (),
        *,
        if_changed: IfChanged = "refuse",
    ) -> None:
        self._if_changed = if_changed
        self._store = store
        self._keys = keys
        self._artifacts = artifacts
        self._plugins = plugins
        self._roles = roles

    def import_(self, source: str, options: ImportOptions | None = None, *, by: str | None = None) -> str:
        """Builds a release from `source` (see `build_release`), stores and registers it; returns its id.

        A checkpoint that was imported before, and differs in nothing but the time, is the release that is here, if
        that is whole.

        Raises:
            NotAllowedError: `by` (unset: the user of this process) is no operator.
            ConfigurationError, ArtifactError, SignatureError: see `build_release`.
        """
        by = current_user() if by is None else by
        require(self._roles, by, Role.OPERATOR, "import a release")
        with tempfile.TemporaryDirectory(prefix="code-worker-import-") as directory:
            built = Path(directory) / "release"
            build_release(source, self._plugins, built, options, keys=self._keys)
            finished = (Path(source).expanduser() / MANIFEST_NAME).is_file()
            return (None if finished else self._same_as(built)) or self.add(built, by=by)

    def _same_as(self, directory: Path) -> str | None:
        """The newest release that differs in nothing but the time, and could be loaded."""
        wanted = essence(read_manifest(directory)[0].model_dump(mode="json"))
        alike = (one.info for one in self.list() if essence(one.info.manifest) == wanted)
        return next((one.id for one in alike if one.status == releases.READY and self._is_whole(one.id)), None)

    def _is_whole(self, release: str) -> bool:
        """Returns whether its files are kept, undamaged, and signed where keys are configured."""
        try:
            # A cached copy alone is on this machine only.
            if self._artifacts.exists(release):
                self._verified(release)
                return True
        except ArtifactError as error:
            log.warning("release_not_whole", release=release, error=str(error))
        return False

    def add(
        self,
        directory: Path,
        *,
        by: str | None = None,
        along: Callable[[Session, str], object] | None = None,
        heads_of: str | None = None,
    ) -> str:
        """Stores and registers a finished release directory; returns its id. Adding it again changes nothing.

        Where keys are configured it is signed: add only what was made here, or what `import_` checked. `by` is for
        the record; unset, it is the user of this process. `along` writes in the transaction that registers it, by its
        id; when it raises, the release is not registered. `heads_of` is the release whose heads it has as they are.

        The files are in the artifact store before the row is written: a row always leads to a whole release, and
        what a crash in between leaves behind is taken up by the next attempt.

        Raises:
            IntegrityError: the directory is damaged.
            ArtifactError: it is no release, cannot be stored, or its files were deleted because of an erasure.
        """
        by, (manifest, sha256) = current_user() if by is None else by, verify_files(directory)
        id_ = release_id(sha256)
        _refuse_retired(id_, self._status(id_))
        failpoint("before_upload")
        location = self._artifacts.put(directory)
        if self._keys:
            self._artifacts.put_signature(id_, sign((directory / MANIFEST_NAME).read_bytes(), self._keys))
        failpoint("after_upload")
        plain, source = manifest.model_dump(mode="json"), manifest.source.uri

        def register(session: Session) -> tuple[bool, str | None]:
            if heads_of is not None:
                snapshots.check_kept_heads(session, heads_of)
            added = releases.add(
                session, id=id_, manifest_sha256=sha256, location=location, manifest=plain, source=source, by=by
            )
            status = releases.status_of(session, id_)
            if status == releases.READY and along is not None:
                along(session, id_)
            return added, status

        try:
            added, status = self._store.run(register)
        except ArtifactError:
            self.discard(id_)
            raise
        if status != releases.READY:
            # Retired while it was stored.
            self._artifacts.drop(id_)
            _refuse_retired(id_, status)
        log.info("release_added", release=id_, new=added, source=source, heads=sorted(manifest.heads))
        return id_

    def drop_head(self, release: str, head: str, *, by: str, default_head: str | None = None) -> str:
        """Adds a release like this one without a head; the others stay as they are. Returns its id.

        The head is not loaded: its plugin may be gone, or score otherwise than it did.

        Raises:
            NotAllowedError: `by` is no operator.
            ConfigurationError, NoReleaseError, ArtifactError, PluginError: see `without_head` and `load`.
        """
        require(self._roles, by, Role.OPERATOR, "leave a head out of a release")
        if head not in (known := self.show(release).heads):
            raise UnknownHeadError(head, known)
        loaded = self.load(release, leave_out=head)
        kept, facts = without_head(loaded, self.directory(release), head, default_head)
        note = partial(snapshots.note_kept_heads, run_id=self._store.new_id(), base=release, by=by)
        with tempfile.TemporaryDirectory(prefix="code-worker-release-") as directory:
            built = Path(directory) / "release"
            build_from_parts(built, loaded.weights, {}, self._plugins, facts, kept=kept)
            return self.add(built, by=by, along=note, heads_of=release)

    def discard(self, release: str) -> None:
        """Deletes what `add` stored of a release but did not register; only while nobody else adds it.

        Raises:
            ArtifactError: the files cannot be deleted.
        """
        if self._status(release) is None:
            self._artifacts.drop(release)

    def _status(self, release: str) -> str | None:
        row = self._store.run(lambda session: releases.get(session, release), write=False)
        return None if row is None else row.status

    def list(self) -> list[Registered]:
        """Every release, newest first."""

        def read(session: Session) -> tuple[Sequence[releases.ReleaseInfo], dict[str, str]]:
            return releases.list_releases(session), releases.aliases(session)

        rows, aliases = self._store.run(read, write=False)
        return [Registered(row, _pointing_to(row.id, aliases)) for row in rows]

    def show(self, release: str) -> Registered:
        """One release.

        Raises:
            NoReleaseError: there is none with this id.
        """
        row, aliases = self._store.run(
            lambda session: (releases.get(session, release), releases.aliases(session)), write=False
        )
        if row is None:
            raise NoReleaseError(f"no release {release!r}; see `code-worker releases list`")
        return Registered(row, _pointing_to(release, aliases))

    def champion(self) -> str | None:
        """Id of the release that judges, or None."""
        return self._store.run(lambda session: releases.alias(session, CHAMPION), write=False)

    def challenger(self) -> str | None:
        """Id of the release that scores in the champion's shadow, or None."""
        return self._store.run(lambda session: releases.alias(session, CHALLENGER), write=False)

    def load(self, release: str, on_bytes: OnBytes | None = None, *, leave_out: str | None = None) -> LoadedRelease:
        """The release in memory: every file compared with the manifest, the manifest with the registered hash.

        The head `leave_out` is not loaded.

        Raises:
            NoReleaseError: it is not registered.
            SignatureError: keys are configured, and none of them signed it.
            ArtifactError: it is missing, damaged (IntegrityError), or cannot be loaded here.
            PluginError: a head's plugin is not installed.
        """
        directory, manifest, signature = self._verified(release)
        # Not trusted to be still there: anyone who may write to the artifact store could put another in its place.
        expected = hashlib.sha256(manifest).hexdigest()
        return load_release(
            directory,
            self._plugins,
            on_bytes,
            keys=self._keys,
            signature=signature,
            expected=expected,
            if_changed=self._if_changed,
            leave_out=leave_out,
        )

    def sign(self, release: str, *, by: str) -> None:
        """Signs a release that is here already, of which somebody made sure where it is from.

        Raises:
            NotAllowedError: `by` is no operator.
            ConfigurationError: no key is configured.
            NoReleaseError, ArtifactError: as `load`.
        """
        require(self._roles, by, Role.OPERATOR, "sign a release")
        _, manifest = self._fetch(release)
        self._artifacts.put_signature(release, sign(manifest, self._keys))
        self._store.run(lambda session: releases.note_signed(session, release, by=by))
        log.info("release_signed", release=release, by=by)

    def directory(self, release: str) -> Path:
        """Returns where the verified files of a registered release are, to be read alone; raises as `load` does."""
        return self._verified(release)[0]

    def _verified(self, release: str) -> tuple[Path, bytes, bytes | None]:
        """Files, manifest and signature, which is by one of the keys where there are some; raises as `load` does."""
        directory, manifest = self._fetch(release)
        signature = self._artifacts.signature(release) if self._keys else None
        check(manifest, signature, self._keys, release)
        return directory, manifest, signature

    def _fetch(self, release: str) -> tuple[Path, bytes]:
        """Returns where the verified files are, and the manifest, which is the registered one."""
        registered = self.show(release).info
        directory = self._artifacts.fetch(release)
        _, sha256 = read_manifest(directory)
        manifest = (directory / MANIFEST_NAME).read_bytes()
        if not sha256 == hashlib.sha256(manifest).hexdigest() == registered.manifest_sha256:
            raise IntegrityError(
                f"{release}: the manifest in {directory} is not the registered one "
                f"({sha256[:16]}… instead of {registered.manifest_sha256[:16]}…)"
            )
        return directory, manifest

    def promote(self, release: str, *, by: str, reason: str = "") -> str | None:
        """Makes a release the champion, after it was proven to load; returns the champion before.

        Raises:
            NoReleaseError, ArtifactError, PluginError: see `load`; the champion stays.
            ArtifactError: the release has no head, or its status forbids it.
            StoreError: it was retired meanwhile.
        """
        require(self._roles, by, Role.OPERATOR, "promote a release")
        with explained(release, self, self._plugins):
            self.load_to_judge(release)
        failpoint("before_promotion")

        tries: list[str | None] = []

        def move(session: Session) -> None:
            tries.append(releases.move_alias(session, CHAMPION, release, by=by, reason=reason))
            failpoint("mid_promotion")

        self._store.run(move)
        before = _before(tries, release)
        failpoint("after_promotion")
        log.info("champion_moved", release=release, before=before, by=by)
        return before

    def rollback(self, *, by: str, reason: str = "") -> str:
        """Makes the previous champion the champion again, after it was proven to load; returns its id.

        Raises:
            StoreError: there is no previous champion, or somebody moved the alias meanwhile.
            ArtifactError, PluginError: it cannot be loaded any more; the champion stays.
        """
        require(self._roles, by, Role.OPERATOR, "roll back")
        move, wanted = self._store.run(lambda session: releases.last_move(session, CHAMPION), write=False)
        with explained(wanted, self, self._plugins, rolls_back=True):
            self.load_to_judge(wanted)
        self._store.run(lambda session: releases.rollback(session, CHAMPION, by=by, reason=reason, move=move))
        log.info("champion_rolled_back", release=wanted, by=by)
        return wanted

    def challenge(self, release: str, *, by: str, reason: str = "") -> str | None:
        """Makes a release the challenger, after it was proven to load; returns the challenger before.

        Raises:
            NoReleaseError, ArtifactError, PluginError: see `load`; the challenger stays.
            ArtifactError: the release has no head.
            StoreError: it is the champion, or was retired.
        """
        require(self._roles, by, Role.OPERATOR, "choose a challenger")
        self._load_with_heads(release)
        tries: list[str | None] = []
        self._store.run(lambda session: tries.append(releases.challenge(session, release, by=by, reason=reason)))
        before = _before(tries, release)
        log.info("challenger_moved", release=release, before=before, by=by)
        return before

    def withdraw(self, *, by: str, reason: str = "") -> str | None:
        """Leaves the champion without a challenger; returns the one that was, or None."""
        require(self._roles, by, Role.OPERATOR, "withdraw the challenger")
        tries: list[str | None] = []
        self._store.run(lambda session: tries.append(releases.drop_alias(session, CHALLENGER, by=by, reason=reason)))
        before = _before(tries, None)
        if before is not None:
            log.info("challenger_withdrawn", release=before, by=by, reason=reason)
        return before

    def load_to_judge(self, release: str) -> LoadedRelease:
        """The release in memory, if it may judge.

        Raises:
            NoReleaseError, ArtifactError, PluginError: see `load`.
            ArtifactError: the release has no head, or its status forbids it.
        """
        status = self.show(release).info.status
        if status != releases.READY:
            raise ArtifactError(f"{release} must not be promoted: {status}")
        return self._load_with_heads(release)

    def past_champions(self) -> Sequence[str]:
        """Ids of releases that judged once, the last one first."""
        history = self._store.run(lambda session: releases.moves(session, CHAMPION), write=False)
        return tuple(dict.fromkeys(move.release_id for move in history))

    def _load_with_heads(self, release: str) -> LoadedRelease:
        loaded = self.load(release)
        if not loaded.heads:
            raise ArtifactError(f"{release} has no head and cannot judge: import it again with --heads DIR")
        return loaded


def _before(tries: Sequence[str | None], now: str | None) -> str | None:
    """Returns where an alias that points to `now` pointed before, by what each try of its move found.

    A try whose commit's answer was lost did move it, and the next one found it moved.
    """
    return next((found for found in reversed(tries) if found != now), now)


def _refuse_retired(release: str, status: str | None) -> None:
    if status not in {None, releases.READY}:
        raise ArtifactError(f"{release} cannot be added again: {status}")


def _pointing_to(release: str, aliases: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted(name for name, target in aliases.items() if target == release))


def open_registry(settings: Settings, *, store: Store, plugins: Plugins) -> Registry:
    """The registry over a store and the artifacts that the settings name.

    Raises:
        ConfigurationError: an artifact address that cannot be.
    """
    return Registry(
        store,
        open_artifacts(settings),
        plugins,
        settings.roles,
        settings.signing_keys,
        if_changed=settings.changed_heads,
    )
