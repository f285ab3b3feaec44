"""Fits every head on the embeddings of a snapshot and builds a release of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from code_worker.data.examples import REAL
from code_worker.data.holdout import refuse_holdout
from code_worker.disk import whole_directory
from code_worker.errors import ArtifactError, ConfigurationError, TrainingError, UnknownHeadError
from code_worker.heads import fit_head, head_spelt, read_options, unknown_head_settings
from code_worker.releases.builder import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source, verify_files
from code_worker.stops import raise_if_stop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights
    from code_worker.heads import Head
    from code_worker.plugins import Plugins
    from code_worker.releases.builder import KeptHeads
    from code_worker.releases.manifest import Manifest
    from code_worker.training.snapshot import Member

__all__ = ["HeadOptions", "HeadPlan", "Origin", "build_candidate", "fit_heads", "plan_heads"]


HeadOptions = Mapping[str, Mapping[str, Any]]
"""Head → its options."""


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """A head to fit: the name under which a plugin registered its class, and its options."""

    plugin_head: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a candidate comes from.

    Attributes:
        kind: retrain or refit.
        run: id of the run.
        base: release whose place it wants, and whose settings it inherits; None: there is none.
        snapshot: id of what it learned from.
    """

    kind: str
    run: str
    base: str | None
    snapshot: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.base or 'nothing'} on snapshot {self.snapshot}"


def plan_heads(
    plugins: Plugins,
    champion: Manifest | None,
    configured: HeadOptions | None = None,
    only: HeadOptions | None = None,
) -> dict[str, HeadPlan]:
    """Every head the champion has, and every other one that a plugin offers, with their options.

    Args:
        plugins: where the classes come from.
        champion: release whose heads are fitted again, with the options that they have there.
        configured: options of `CODE_WORKER_HEADS` by head, which come before those.
        only: heads to be planned, and options that come before all; unset: every one.

    Raises:
        UnknownHeadError: one of `only` that neither the champion nor a plugin has.
        ConfigurationError: one in the settings that neither has, or options that a head refuses.
    """
    own = {} if champion is None else champion.heads
    plans = {name: HeadPlan(name, {}) for name in plugins.heads()}
    plans |= {name: HeadPlan(entry.plugin_head, entry.options) for name, entry in own.items()}
    if wrong := unknown_head_settings(configured or {}, plans):
        raise ConfigurationError("; ".join(wrong))
    # Only variables have no `-`: elsewhere a head is written as it is called.
    for given in ({head_spelt(name, plans) or name: options for name, options in (configured or {}).items()}, only):
        for name, options in (given or {}).items():
            if name not in plans:
                raise UnknownHeadError(name, tuple(sorted(plans)))
            if options:
                plan = plans[name]
                head_class = plugins.head_class(plan.plugin_head)
                plans[name] = replace(plan, options=read_options(name, head_class, options, plan.options))
    return {name: plan for name, plan in sorted(plans.items()) if only is None or name in only}


def fit_heads(
    plans: Mapping[str, HeadPlan], plugins: Plugins, members: Sequence[Member], embeddings: NDArray[np.float32]
) -> dict[str, Head]:
    """Fits each head; a one-class head is given the reals alone.

    Args:
        plans: what to fit, by the name in the release.
        plugins: where the classes come from.
        members: the images, none of the hold-out.
        embeddings: `(n, 192) float32`, row i of `members[i]`.

    Raises:
        TrainingError: an image of the hold-out, or a head that cannot be fitted; the text names it.
        UnknownHeadError: a head whose plugin is not installed.
    """
    refuse_holdout(members)
    labels = np.array([member.label for member in members], dtype=np.int8)
    return {
        name: _fit(name, plan, plugins.head_class(plan.plugin_head), embeddings, labels)
        for name, plan in plans.items()
    }


def _fit(
    name: str, plan: HeadPlan, head_class: type[Head], embeddings: NDArray[np.float32], labels: NDArray[np.int8]
) -> Head:
    try:
        return fit_head(head_class(plan.options), embeddings, labels)
    except (Exception, SystemExit) as error:  # a head is somebody else's code: whatever it raises, it fails by name
        raise_if_stop(error)
        images = np.count_nonzero(labels == REAL) if head_class.one_class else len(labels)
        raise TrainingError(
            f"head {name!r} cannot be fitted on {images} images: {type(error).__name__}: {error}"
        ) from error


def build_candidate(
    directory: Path,
    weights: EncoderWeights,
    heads: Mapping[str, Head],
    *,
    plans: Mapping[str, HeadPlan],
    plugins: Plugins,
    champion: Manifest | None,
    origin: Origin,
    evaluation: Mapping[str, Any],
    kept: KeptHeads | None = None,
) -> None:
    """Writes the candidate into `directory`, unless a whole one is there from an attempt before.

    It inherits default head, thresholds and the mark of a toy from the champion, and `kept` heads as they are.

    Raises:
        ArtifactError: a head that cannot be saved, or scores otherwise once it is loaded back.
    """
    if _is_whole(directory):
        return
    inherited: dict[str, Any] = {}
    if champion is not None:
        inherited = {
            "default_head": champion.default_head,
            "thresholds": champion.thresholds,
            "toy": champion.toy,
        }
    of = f" of {', '.join(sorted(heads))}" if kept is not None and kept.entries else ""
    facts = ReleaseFacts(
        source=Source(uri=str(origin)),
        plugin_heads={name: plan.plugin_head for name, plan in plans.items()},
        evaluation=evaluation,
        notes=f"{origin.kind}{of} by run {origin.run}",
        **inherited,
    )
    with whole_directory(directory) as partial:
        build_from_parts(partial, weights, heads, plugins, facts, kept=kept)


def _is_whole(directory: Path) -> bool:
    try:
        verify_files(directory)
    except ArtifactError:
        return False
    return True
