"""Writes a release directory from an encoder and fitted heads, and proves that what was written is what was given."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import ValidationError

from code_worker.errors import ArtifactError, ConfigurationError, UnknownHeadError
from code_worker.heads import fit_head
from code_worker.releases.integrity import FileEntry, describe_files, files_below
from code_worker.releases.loading import head_directory, load_head
from code_worker.releases.manifest import (
    MANIFEST_NAME,
    EncoderEntry,
    HeadEntry,
    Manifest,
    Preprocessing,
    Source,
    Thresholds,
    encoder_digest,
    head_digest,
    write_manifest,
)
from code_worker.releases.reference_scores import check_same_scores, write_probes
from code_worker.system.processes import raise_if_stop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights
    from code_worker.heads import Head
    from code_worker.plugins import Plugins
    from code_worker.releases.loading import LoadedRelease


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseFacts:
    """Facts of a manifest beside its files.

    Attributes:
        source: what the release was made from.
        plugin_heads: release head name → name under which a plugin registered its class, where the two differ.
        default_head: head for jobs that nobody chose one for; unset: `linear` if there is one, else the first.
        thresholds: label borders where no policy sets others.
        evaluation: report of the evaluation, free JSON.
        toy: whether the encoder was never trained, so that verdicts mean nothing.
        notes: free text.
    """

    source: Source
    plugin_heads: Mapping[str, str] = field(default_factory=dict)
    default_head: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    toy: bool = False
    notes: str = ""


@dataclass(frozen=True, slots=True)
class KeptHeads:
    """Heads of another release with the same encoder, that go into this one as they are, file by file.

    Attributes:
        directory: that release.
        entries: what its manifest says of each.
        heads: the heads, as they were loaded from there.
    """

    directory: Path
    entries: Mapping[str, HeadEntry] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedRelease, directory: Path, without: Collection[str]) -> Self:
        """The heads of a release that was loaded from `directory`, all but those named."""
        entries = {name: entry for name, entry in loaded.manifest.heads.items() if name not in without}
        return cls(directory, entries, {name: loaded.heads[name] for name in entries})


def without_head(
    loaded: LoadedRelease, directory: Path, head: str, default_head: str | None
) -> tuple[KeptHeads, ReleaseFacts]:
    """Returns what a release like this one is made of that lacks one of its heads.

    Raises:
        UnknownHeadError: the release lacks the head, or the default head.
        ConfigurationError: it is the only head, or the default one and no other is named.
    """
    manifest = loaded.manifest
    if unknown := {head, default_head} - {None, *manifest.heads}:
        raise UnknownHeadError(str(unknown.pop()), tuple(sorted(manifest.heads)))
    kept = KeptHeads.of(loaded, directory, {head})
    if (default := default_head or manifest.default_head) not in kept.entries:
        hint = "name another with --default-head" if kept.entries else "it is the only one"
        raise ConfigurationError(f"jobs of {loaded.id} are judged with {head!r} by default: {hint}")
    # What the heads that stay have learned is found by this, where no run is known.
    learned = re.search(r" on snapshot \S+$", manifest.source.uri)
    return kept, ReleaseFacts(
        source=Source(uri=f"refit of {loaded.id}{learned[0]}" if learned else f"{loaded.id} without {head}"),
        default_head=default,
        thresholds=manifest.thresholds,
        evaluation=manifest.evaluation,
        toy=manifest.toy,
        notes=f"{loaded.id} without head {head} (drop-head)\n{manifest.notes}".strip(),
    )


def build_from_parts(
    directory: Path,
    weights: EncoderWeights,
    heads: Mapping[str, Head],
    plugins: Plugins,
    facts: ReleaseFacts,
    *,
    kept: KeptHeads | None = None,
) -> str:
    """Writes the release into `directory`, which must be new or empty; returns the manifest's sha256.

    Raises:
        ArtifactError: the directory holds something, a head cannot be saved, or scores differently once loaded back.
        UnknownHeadError: a head of a class that no plugin registered.
    """
    from code_worker.encoder.weights import save_weights

    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ArtifactError(f"{directory} is not empty; a release is written into a directory of its own")
    save_weights(weights, directory)
    for name, head in heads.items():
        _save_head(name, head, head_directory(directory, name))
    kept = kept or KeptHeads(directory)
    for name in kept.entries:
        shutil.copytree(head_directory(kept.directory, name), head_directory(directory, name))
    every = {**heads, **kept.heads}
    if every:
        write_probes(directory, weights, every, kept=kept.entries, base=kept.directory)
    manifest = _describe(directory, weights, heads, plugins, facts, kept=kept.entries)
    loaded = {name: load_head(directory, name, entry, plugins) for name, entry in manifest.heads.items()}
    check_same_scores(every, loaded)
    return write_manifest(directory, manifest)


def _save_head(name: str, head: Head, directory: Path) -> None:
    directory.mkdir(parents=True)
    try:
        head.save(directory)
    except ArtifactError:
        raise
    except (Exception, SystemExit) as error:  # a head is somebody else's code: if it raises, nothing is built
        raise_if_stop(error)
        raise ArtifactError(f"head {name!r} cannot be saved: {type(error).__name__}: {error}") from error
    if not files_below(directory):
        raise ArtifactError(f"head {name!r} saved no file")


def _describe(
    directory: Path,
    weights: EncoderWeights,
    heads: Mapping[str, Head],
    plugins: Plugins,
    facts: ReleaseFacts,
    *,
    kept: Mapping[str, HeadEntry],
) -> Manifest:
    files = describe_files(directory, leave_out={MANIFEST_NAME})
    preprocessing = Preprocessing(crop=weights.config.image_size, mean=weights.config.mean, std=weights.config.std)
    encoder = tuple(name for name in files if name.startswith("encoder/"))
    try:
        return Manifest(
            created_at=datetime.now(UTC).replace(microsecond=0),
            source=facts.source,
            encoder=EncoderEntry(
                config=_summary(weights), files=encoder, sha256=encoder_digest(encoder, files, preprocessing)
            ),
            preprocessing=preprocessing,
            heads={
                name: _head_entry(name, head, facts.plugin_heads.get(name, name), files, plugins)
                for name, head in heads.items()
            }
            | dict(kept),
            thresholds=facts.thresholds,
            default_head=facts.default_head or _first_choice({**heads, **kept}),
            evaluation=dict(facts.evaluation),
            files=files,
            toy=facts.toy,
            notes=facts.notes,
        )
    except ValidationError as error:
        reasons = "; ".join(item["msg"] for item in error.errors())
        raise ArtifactError(f"release in {directory} cannot be described: {reasons}") from None


def _summary(weights: EncoderWeights) -> dict[str, Any]:
    parameters = sum(tensor.numel() for tensor in weights.state.values())
    sizes = (
        "image_size",
        "patch_size",
        "width",
        "depth",
        "heads",
        "mlp_width",
        "qkv_bias",
        "layer_norm_eps",
        "activation",
    )
    return {"parameters": parameters, **{name: getattr(weights.config, name) for name in sizes}}


def _head_entry(
    name: str, head: Head, plugin_head: str, files: Mapping[str, FileEntry], plugins: Plugins
) -> HeadEntry:
    own = tuple(file for file in files if file.startswith(f"heads/{name}/"))
    options = head.options.model_dump(mode="json")
    provider = plugins.provider(plugin_head)
    return HeadEntry(
        plugin_head=plugin_head,
        target=f"{type(head).__module__}:{type(head).__qualname__}",
        distribution=provider.distribution,
        distribution_version=provider.version,
        options=options,
        one_class=head.one_class,
        files=own,
        sha256=head_digest(own, files, options),
    )


def _first_choice(heads: Mapping[str, object]) -> str | None:
    return "linear" if "linear" in heads else min(heads, default=None)


TOY_NOTE = "TOY: the encoder was never trained; verdicts of this release say nothing about real images."


def build_toy_release(
    directory: Path,
    crops: NDArray[np.uint8],
    labels: NDArray[np.int8],
    plugins: Plugins,
    *,
    seed: int = 0,
    heads: Sequence[str] = ("linear", "knn", "svm"),
    depth: int = 12,
    weights: EncoderWeights | None = None,
    note: str = TOY_NOTE,
) -> str:
    """Writes a toy release into the new directory; returns the manifest's sha256.

    Args:
        directory: where to.
        crops: `(n, 224, 224, 3) uint8`.
        labels: `(n,) int8`, 0 real, 1 generated; both must occur.
        plugins: where the heads come from.
        seed: of the encoder's random weights.
        heads: which heads to fit; one-class heads get the real crops alone.
        depth: blocks of the encoder; 12 is the published size.
        weights: the encoder, instead of one that was never trained.
        note: what the release says of itself.

    Raises:
        UnknownHeadError: a head that no plugin registered.
        ValueError: crops and labels that do not go together.
    """
    from code_worker.encoder.loop import EncoderLoop
    from code_worker.encoder.torch_engine import Engine
    from code_worker.encoder.weights import random_weights

    if len(crops) != len(labels):
        raise ValueError(f"{len(crops)} crops, but {len(labels)} labels")
    encoder = weights or random_weights(seed, depth=depth)
    with EncoderLoop(Engine(encoder, device="cpu"), streams=None, micro_batch=None) as loop:
        embeddings = loop.embed(crops)
    fitted = {name: fit_head(plugins.head_class(name)(), embeddings, labels) for name in heads}
    origin = f"toy, {weights.source}" if weights else f"toy, seed {seed}"
    facts = ReleaseFacts(source=Source(uri=origin), toy=True, notes=note)
    return build_from_parts(directory, encoder, fitted, plugins, facts)
