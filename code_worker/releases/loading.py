"""From a directory to a release that can judge: hashes first, then the encoder, then heads through their plugins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from code_worker.errors import ArtifactError, IntegrityError, PluginError, UnknownHeadError
from code_worker.heads import Head
from code_worker.logs import get_logger
from code_worker.releases.integrity import check, signature_in
from code_worker.releases.manifest import MANIFEST_NAME, HeadEntry, Manifest, Thresholds, release_id, verify_files
from code_worker.releases.reference_scores import (
    PROBES_NAME,
    Changed,
    checked_scores,
    golden_embeddings,
    probe_scores_changed,
    read_probes,
)
from code_worker.system.processes import raise_if_stop

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import SecretStr

    from code_worker.encoder.weights import EncoderWeights
    from code_worker.plugins import Plugins
    from code_worker.releases.integrity import OnBytes

log = get_logger(__name__)
IfChanged = Literal["refuse", "warn"]
"""What becomes of a release whose head no longer scores its probes as it did when it was made."""
_PROBES = 4


@dataclass(frozen=True, slots=True)
class LoadedRelease:
    """A release in memory, all of it from files whose hashes were right.

    Attributes:
        id: release id.
        manifest_sha256: hash of its manifest, the whole of what `id` abbreviates.
        manifest: what the release says of itself.
        weights: the encoder.
        heads: fitted heads by the name under which jobs ask for them.
        head_sha256: hash of each head's files and options.
        head_plugins: distribution and version of what loaded each head here.
        encoder_sha256: hash of the encoder's files and the preprocessing; equal hashes give equal embeddings.
    """

    id: str
    manifest_sha256: str
    manifest: Manifest
    weights: EncoderWeights
    heads: Mapping[str, Head]
    head_sha256: Mapping[str, str]
    head_plugins: Mapping[str, str]
    encoder_sha256: str


@dataclass(frozen=True, slots=True)
class LoadedHeads:
    """The heads of a release, of which each scores its probes as it did, or is used although it does not.

    Attributes:
        heads: fitted heads by name.
        plugins: distribution and version of what loaded each here.
        warnings: a sentence for each that scores otherwise.
    """

    heads: Mapping[str, Head]
    plugins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def head_directory(directory: Path, name: str) -> Path:
    """Returns where a release directory keeps the files of the head `name`."""
    return directory / "heads" / name


def load_release(
    directory: Path,
    plugins: Plugins,
    on_bytes: OnBytes | None = None,
    *,
    keys: Sequence[SecretStr] = (),
    signature: bytes | None = None,
    expected: str | None = None,
    if_changed: IfChanged = "refuse",
    leave_out: str | None = None,
) -> LoadedRelease:
    """Loads a release directory, all of it or nothing.

    Args:
        directory: the release.
        plugins: what loads its heads.
        on_bytes: told of progress.
        keys: one of them must have signed the manifest. The files are then compared once more after they were read.
        signature: the signature, where it is not the one that lies in the directory.
        expected: hash that the manifest must have.
        if_changed: whether a head that scores the probes otherwise than when the release was made, by more than its
            tolerance, is refused, or used with a warning. Rounding by the version that made it
            (`Changed.is_rounding`) is only warned of. Releases made before there were probes are not compared.
        leave_out: a head that is not loaded, so that its plugin need not be here.

    Raises:
        SignatureError: there are keys, and none of them made the signature.
        IntegrityError: its files are not those of the manifest, or it is another manifest, and nothing of them was
            parsed; or somebody changed them meanwhile.
        ArtifactError: a part cannot be loaded, or a head does not keep its contract or scores otherwise than it did.
        PluginError: a head's plugin is not installed.
    """
    from code_worker.encoder.weights import read_weights

    # All hashes before anything is parsed: parsers of weights and of a head's files see verified bytes alone.
    manifest, sha256 = verify_files(directory, on_bytes)
    _refuse_swapped(directory, sha256, expected or sha256)
    if keys:
        # Read once more for the signature, and compared: the bytes that are signed must be those that were verified.
        content = (directory / MANIFEST_NAME).read_bytes()
        _refuse_swapped(directory, hashlib.sha256(content).hexdigest(), sha256)
        check(content, signature_in(directory) if signature is None else signature, keys, str(directory))
    weights = read_weights(directory)
    loaded = load_heads(directory, manifest, release_id(sha256), plugins, if_changed=if_changed, leave_out=leave_out)
    if keys:
        # Between hash and use somebody may have put other files there; with keys configured that is an attack to be
        # seen.
        _refuse_swapped(directory, verify_files(directory)[1], sha256)
    return LoadedRelease(
        id=release_id(sha256),
        manifest_sha256=sha256,
        manifest=manifest,
        weights=weights,
        heads=loaded.heads,
        head_sha256={name: entry.sha256 for name, entry in manifest.heads.items()},
        head_plugins=loaded.plugins,
        encoder_sha256=manifest.encoder.sha256,
    )


def load_heads(
    directory: Path,
    manifest: Manifest,
    release: str,
    plugins: Plugins,
    *,
    if_changed: IfChanged = "refuse",
    leave_out: str | None = None,
) -> LoadedHeads:
    """The heads of a release directory whose files were verified, compared with their past; no encoder is needed.

    Raises:
        ArtifactError, PluginError: see `load_release`.
    """
    # Left out before its class is asked for: the plugin may be gone.
    entries = {name: entry for name, entry in manifest.heads.items() if name != leave_out}
    heads = {name: load_head(directory, name, entry, plugins) for name, entry in entries.items()}
    probes = read_probes(directory) if PROBES_NAME in manifest.files else None
    loaded_by = {name: plugins.provider(entry.plugin_head).release for name, entry in entries.items()}
    warnings = [
        _refuse_or_warn(changed, release, entries[changed.head], loaded_by[changed.head], if_changed)
        for changed in _changed_heads(release, heads, probes, manifest.thresholds)
    ]
    return LoadedHeads(heads, loaded_by, tuple(warnings))


def _changed_heads(
    release: str,
    heads: Mapping[str, Head],
    probes: Mapping[str, NDArray[np.float64]] | None,
    thresholds: Thresholds,
) -> Iterator[Changed]:
    if probes is None and heads:
        log.info("release_without_probes", release=release, hint="heads are not compared with their past")
    # A score that moved across one of these changes verdicts, however little it moved.
    borders = {0.5, thresholds.low, thresholds.high}
    for name, head in heads.items():
        if probes is None:
            checked_scores(name, head, golden_embeddings(_PROBES))
        elif (changed := probe_scores_changed(name, head, probes, borders)) is not None:
            yield changed


def _refuse_or_warn(changed: Changed, release: str, entry: HeadEntry, loaded_by: str, if_changed: IfChanged) -> str:
    """Returns what is wrong with a head that is used all the same."""
    made_by = f"{entry.distribution} {entry.distribution_version}".strip()
    problem = (
        f"head {changed.head!r} of {release} does not score as it did when the release was made: by up to "
        f"{changed.difference:.3g} on the release's probes, {changed.allowed:g} is allowed (made by {made_by}, "
        f"loaded by {loaded_by})"
    )
    rounding = made_by == loaded_by and changed.is_rounding
    if rounding or if_changed == "warn":
        hint = "as another processor rounds: let the head sum in float64, or declare a tolerance" if rounding else ""
        log.warning(
            "head_changed",
            release=release,
            head=changed.head,
            difference=changed.difference,
            allowed=changed.allowed,
            flipped=changed.flipped,
            made_by=made_by,
            loaded_by=loaded_by,
            **({"hint": hint} if hint else {}),
        )
        return f"{problem}{f'; {hint}' if hint else ''}"
    raise ArtifactError(f"{problem}. Install the code that made it, or set CODE_WORKER_CHANGED_HEADS=warn and refit")


def _refuse_swapped(directory: Path, found: str, expected: str) -> None:
    """Refuses a manifest that changed after it was compared with the database or a signature."""
    if found != expected:
        raise IntegrityError(
            f"{directory}: the manifest is not the expected one ({found[:16]}…, not {expected[:16]}…)"
        )


def load_head(directory: Path, name: str, entry: HeadEntry, plugins: Plugins) -> Head:
    """One head of a release directory whose files were verified.

    Raises:
        PluginError: the plugin that wrote the head is not installed; names its distribution and version.
        ArtifactError: the plugin cannot load these files.
    """
    try:
        head_class = plugins.head_class(entry.plugin_head)
    except UnknownHeadError:
        raise PluginError(
            f"head {name!r} needs the plugin head {entry.plugin_head!r} ({entry.target}) of "
            f"{entry.distribution} {entry.distribution_version}, which is not installed. Install it again; "
            f"or leave the head out (`code-worker releases drop-head RELEASE {name}`) and promote what that makes, "
            "or promote a release that has no such head (`code-worker releases list`)"
        ) from None
    try:
        return head_class.load(head_directory(directory, name), entry.options)
    except ArtifactError:
        raise
    except (Exception, SystemExit) as error:  # a head is somebody else's code: if it raises, it cannot be used
        raise_if_stop(error)
        raise ArtifactError(
            f"head {name!r} cannot be loaded by {entry.target} (written by {entry.distribution} "
            f"{entry.distribution_version}): {type(error).__name__}: {error}"
        ) from error
