"""Stages of a learning run; each finds what an earlier process left and goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from code_worker.errors import DatasetError, NoReleaseError, TrainingError
from code_worker.logs import get_logger
from code_worker.releases.building import KeptHeads
from code_worker.releases.manifest import Thresholds
from code_worker.store import policies, releases
from code_worker.store.erasure import receipts
from code_worker.store.learning import runs
from code_worker.training import snapshot as snapshots
from code_worker.training.evaluation.page import write_report
from code_worker.training.fitting.launch import MissedGenerators, train_encoder
from code_worker.training.gate.comparison import (
    Side,
    gate_inputs,
    golden_scores,
    measured,
    missed_generators,
    unseen_generators,
)
from code_worker.training.gate.gate_inputs import (
    CrossFitted,
    TrainedOn,
    compared_on,
    policy_rules,
    spend_on,
    stale_scopes,
    trained_on,
    unlearned,
)
from code_worker.training.gate.label_quality import drop_floods
from code_worker.training.gate.rule import decide
from code_worker.training.gate.safeguards import GoldenSet, load_golden, without_golden
from code_worker.training.refit import Origin, build_candidate, cross_fitted, fit_heads, more_images, plan_heads
from code_worker.training.run_context import RunOutcome
from code_worker.training.snapshot_embeddings import (
    CONDITIONS,
    EmbeddingsByCondition,
    check_readable,
    embedding_matrix,
    open_encoder,
)

if TYPE_CHECKING:
    from code_worker.encoder.weights import EncoderWeights
    from code_worker.heads import Head
    from code_worker.releases.loading import LoadedRelease
    from code_worker.store.engine import Session
    from code_worker.training.gate.gate_inputs import Spending
    from code_worker.training.gate.rule import GateDecision
    from code_worker.training.refit import HeadPlan
    from code_worker.training.run_context import RunContext
    from code_worker.training.snapshot import Member, Snapshot

_QUOTED: Final = 50
log = get_logger(__name__)


@dataclass(slots=True, eq=False)
class Stages:
    """An attempt as it proceeds; `report` is what the run will say of itself."""

    attempt: RunContext
    report: dict[str, Any] = field(default_factory=dict)
    _views: dict[str, EmbeddingsByCondition] = field(default_factory=dict)
    _loaded_base: LoadedRelease | None = None
    _golden_set: GoldenSet | None = None
    _golden_read: bool = False

    def work(self) -> RunOutcome | None:
        """Goes through all stages; None when the run ended by moving an alias.

        Raises:
            RunLostError, RunStoppedError: see `Held.check`.
            CodeWorkerError: why the run failed.
        """
        taken = self._take_snapshot()
        if isinstance(taken, RunOutcome):
            return taken
        candidate = self.attempt.run.candidate
        if candidate is None:
            candidate = self._make_candidate(taken)
        return self._judge(candidate, taken)

    def _enter(self, stage: str) -> None:
        self.attempt.held.check()
        self.attempt.held.note(stage=stage)
        self.attempt.listen(stage, {})
        log.info("run_stage", run=self.attempt.run.id, kind=self.attempt.run.kind, stage=stage)

    def _take_snapshot(self) -> Snapshot | RunOutcome:
        if self.attempt.run.snapshot_id is not None:
            known = self.attempt.run.snapshot_id
            taken = self.attempt.parts.store.run(lambda session: snapshots.load(session, known), write=False)
            self.report["snapshot"] = taken.counts()
            return taken
        self._enter("snapshot")
        labels = self.attempt.settings.labels
        taken = self.attempt.parts.store.run(lambda session: snapshots.take(session, labels), write=False)
        # Embeddings are asked for only where a run may be due.
        for sift in (None, self._without_golden, self._without_floods):
            taken = taken if sift is None else sift(taken)
            self.report["snapshot"] = taken.counts()
            snapshots.check_classes(taken)
            if not self.attempt.run.config.get("force") and (why := self._why_wait(taken)):
                return RunOutcome("skipped", why)

        def freeze(session: Session) -> Snapshot:
            frozen = snapshots.freeze(session, taken)
            runs.note(session, self.attempt.held.lease, snapshot_id=frozen.id)
            return frozen

        return self.attempt.held.write(freeze)

    def _without_golden(self, taken: Snapshot) -> Snapshot:
        golden, parts = self._golden(), self.attempt.parts
        return taken if golden is None else without_golden(taken, golden, parts.store, parts.settings.limits)

    def _without_floods(self, taken: Snapshot) -> Snapshot:
        """Nearly the same image over and over counts a few times; told by the champion's encoder, if there is one."""
        most, base = self.attempt.settings.labels.max_duplicates, self._base()
        if most is None or base is None:
            return taken
        rows = self._see(base.weights, base.encoder_sha256, taken).clean
        seen = [member for member in taken.members if member.sha256 in rows]
        unseen = [member for member in taken.members if member.sha256 not in rows]
        stay, left = drop_floods(seen, embedding_matrix(seen, rows), most)
        return taken.without("duplicates", sorted([*stay, *unseen], key=lambda one: one.sha256), left)

    def _golden(self) -> GoldenSet | None:
        if not self._golden_read:
            self._golden_set, self._golden_read = load_golden(self.attempt.settings), True
        return self._golden_set

    def _owed(self, champion: str | None) -> bool:
        """Returns whether the champion learned from what was erased, so that its files wait to be deleted."""
        return champion in self.attempt.parts.store.run(receipts.releases_owed, write=False)

    def _why_wait(self, taken: Snapshot) -> list[str]:
        parts, champion = self.attempt.parts, self.attempt.parts.registry.champion()
        wait = partial(snapshots.reasons_to_wait, taken=taken, kind=self.attempt.run.kind, champion=champion)
        return parts.store.run(partial(wait, settings=parts.settings), write=False)

    def _make_candidate(self, taken: Snapshot) -> str:
        base = self._base()
        weights, digest = (base.weights, base.encoder_sha256) if base is not None else (None, "")
        if self.attempt.run.kind == "retrain":
            self._enter("train")
            missed = MissedGenerators() if base is None else self._missed_generators(base, taken)
            weights, digest = train_encoder(self.attempt, taken, base, partial(self.attempt.listen, "train"), missed)
        if weights is None:
            raise NoReleaseError("no champion whose encoder the heads could be fitted on: import a release first")
        self._enter("refit")
        views = self._see(weights, digest, taken)
        self._build(weights, views, taken, base)
        return self.attempt.add_candidate()

    def _missed_generators(self, base: LoadedRelease, taken: Snapshot) -> MissedGenerators:
        """Returns what the training should oversample; the gate will want the same embeddings of the champion."""
        side = self._side(base, taken, like=None)
        learned = taken.of_training_share()
        missed = MissedGenerators(
            missed_generators(learned.members, side), frozenset(unseen_generators(learned, side))
        )
        self.report |= {"missed_generators": sorted(missed.missed), "unseen_generators": sorted(missed.unseen)}
        return missed

    def _base(self) -> LoadedRelease | None:
        if self._loaded_base is None and self.attempt.run.base_release is not None:
            self._loaded_base = self.attempt.parts.registry.load(self.attempt.run.base_release)
        return self._loaded_base

    def _build(
        self, weights: EncoderWeights, views: EmbeddingsByCondition, taken: Snapshot, base: LoadedRelease | None
    ) -> None:
        train = [member for member in taken.training_share if member.sha256 in views.clean]
        if {member.label for member in train} != {0, 1}:
            raise DatasetError("of the labelled images that can be read, not both classes are left to learn from")
        plans, some = self._plans(base), self.attempt.run.config.get("heads") is not None
        heads = fit_heads(plans, self.attempt.parts.plugins, train, embedding_matrix(train, views.clean))
        self.report["heads"] = {name: head.options.model_dump(mode="json") for name, head in heads.items()}
        self.attempt.held.check()
        files = self.attempt.parts.registry.directory
        build_candidate(
            self.attempt.place.candidate,
            weights,
            heads,
            plans=plans,
            plugins=self.attempt.parts.plugins,
            champion=None if base is None else base.manifest,
            origin=Origin(self.attempt.run.kind, self.attempt.run.id, self.attempt.run.base_release, taken.id),
            evaluation=self._evaluation(heads, views, taken, base),
            kept=KeptHeads.of(base, files(base.id), heads) if some and base is not None else None,
        )

    def _plans(self, base: LoadedRelease | None) -> dict[str, HeadPlan]:
        manifest, config = None if base is None else base.manifest, self.attempt.run.config
        return plan_heads(self.attempt.parts.plugins, manifest, self.attempt.settings.heads, config.get("heads"))

    def _evaluation(
        self, heads: Mapping[str, Head], views: EmbeddingsByCondition, taken: Snapshot, base: LoadedRelease | None
    ) -> dict[str, Any]:
        fair = self._unlearned(taken, self.attempt.run.base_release)
        held_out = [member for member in fair.holdout if all(member.sha256 in rows for rows in views.rows.values())]
        thresholds = base.manifest.thresholds if base is not None else Thresholds()
        side = Side("candidate", "", heads, next(iter(heads), ""), thresholds, views.rows)
        return {
            "snapshot": taken.id,
            "digest": taken.digest,
            "images": taken.counts(),
            "holdout": measured(held_out, side.opinion(held_out)),
        }

    def _see(self, weights: EncoderWeights, encoder_sha256: str, taken: Snapshot) -> EmbeddingsByCondition:
        """The snapshot through an encoder, once per process and encoder."""
        if encoder_sha256 in self._views:
            return self._views[encoder_sha256]
        parts = self.attempt.parts
        judged = [*taken.holdout, *self._more(taken)]
        with open_encoder(
            weights,
            encoder_sha256,
            settings=parts.settings,
            store=parts.store,
            kept=parts.kept,
            # Once the run's token is spent, it keeps nothing more.
            write=self.attempt.held.write,
        ) as encoder:
            seen = {
                condition: encoder.see(members, condition, self._counter(condition.key, len(members)))
                for condition, members in zip(CONDITIONS, (taken.members, judged), strict=True)
            }
            golden = self._golden()
            extra = {} if golden is None else encoder.see_examples(golden.examples).rows
        clean = seen[CONDITIONS[0]]
        check_readable(taken.members, clean)
        rows = {condition.key: one.rows for condition, one in seen.items()}
        views = EmbeddingsByCondition({**rows, CONDITIONS[0].key: {**clean.rows, **extra}}, clean.skipped)
        self._views[encoder_sha256] = views
        quoted = [{"sha256": one.key, "reason": one.reason} for one in views.skipped[:_QUOTED]]
        self.report["skipped"] = {"images": len(views.skipped), "some": quoted}
        return views

    def _more(self, taken: Snapshot) -> list[Member]:
        """Returns what a refit judges beside the hold-out; a retrain's encoder learns from all of it."""
        if self.attempt.run.kind != "refit" or self.attempt.run.base_release is None:
            return []
        known = self._taught(self.attempt.run.base_release)
        # Of a release that was made elsewhere nobody knows whether these are what its heads were fitted on.
        return [] if known.heads is None else more_images(taken, known.encoder)

    def _taught(self, release: str, head: str | None = None) -> TrainedOn:
        return self.attempt.parts.store.run(lambda session: trained_on(session, release, head), write=False)

    def _unlearned(self, taken: Snapshot, release: str | None) -> Snapshot:
        known = [] if release is None else [release]
        return self.attempt.parts.store.run(lambda session: unlearned(session, taken, known), write=False)

    def _counter(self, what: str, total: int) -> Callable[[int], None]:
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.attempt.held.check()
            self.attempt.listen("embed", {"condition": what, "done": done, "total": total})

        return count

    def _judge(self, candidate: str, taken: Snapshot) -> RunOutcome | None:
        """Compares with the present champion, until nobody moves that alias meanwhile."""
        loaded = self.attempt.parts.registry.load_to_judge(candidate)
        if self.attempt.run.kind == "retrain":
            self._enter("report")
            # Once per transform of the preset, and once as they are.
            fair = self._unlearned(taken, candidate)
            write_report(self.attempt, loaded, fair, self._counter("report", 3 * len(fair.holdout)))
        challenge = bool(self.attempt.run.config.get("challenge"))
        if not challenge:
            self._enter("gate")
        while True:
            champion = self.attempt.parts.registry.champion()
            if champion == candidate:
                return RunOutcome("promoted", ["somebody made it the champion before the gate could"])
            reasons = ["it became the challenger, as was asked for: no gate compared it"]
            if not challenge:
                decision = self._decide(loaded, champion, taken)
                if not decision.promote:
                    return RunOutcome("rejected", decision.reasons)
                reasons = list(decision.reasons)
            self._enter("promote")
            if self._move_alias(candidate, champion, reasons, challenge=challenge):
                return None
            log.info("champion_moved_meanwhile", run=self.attempt.run.id, compared_with=champion)

    def _decide(self, candidate: LoadedRelease, champion: str | None, taken: Snapshot) -> GateDecision:
        rival = None if champion is None else self.attempt.parts.registry.load(champion)
        sides = (
            self._side(candidate, taken, like=rival),
            None if rival is None else self._side(rival, taken, like=None),
        )
        golden, read = self._golden(), partial(self.attempt.parts.store.run, write=False)
        rows = read(policies.in_force)
        asked = read(lambda session: compared_on(session, taken, candidate=candidate.id, champion=champion))
        inputs = gate_inputs(
            asked,
            *sides,
            min_holdout=self.attempt.settings.schedule.min_holdout,
            min_labellers=self.attempt.settings.labels.min_labellers,
            golden=None if golden is None else golden_scores(golden, *sides),
            owed=self._owed(champion),
            more=self._cross_fitted(taken, *sides),
            policies=() if sides[1] is None else policy_rules(rows, sides[1].head, sides[1].decides_at),
        )
        if champion is not None:
            inputs = replace(
                inputs,
                spending=self._spend(candidate.id, champion, len(inputs.labels)),
                unrecorded=self._taught(champion).heads is None,
            )
        decision = decide(inputs, self.attempt.settings.gate)
        self.report["gate"] = {**decision.report, "learned": dict(asked.left_out.get("learned", {}))}
        return decision

    def _spend(self, candidate: str, champion: str, images: int) -> Spending:
        run, error = self.attempt.run.id, self.attempt.settings.gate.error
        return self.attempt.held.write(
            lambda session: spend_on(
                session, run_id=run, champion=champion, candidate=candidate, images=images, error=error
            )
        )

    def _cross_fitted(self, taken: Snapshot, candidate: Side, champion: Side | None) -> CrossFitted | None:
        more, base = self._more(taken), self._base()
        # Where somebody moved the champion meanwhile, another encoder may have learned from these images.
        if not more or base is None or champion is None or champion.release != base.id:
            return None
        heads = self._taught(base.id, champion.head).heads
        if heads is None:
            return None
        plugins = self.attempt.parts.plugins
        return cross_fitted(
            more,
            taken,
            candidate,
            champion,
            plans=(self._plans(base), plan_heads(plugins, base.manifest)),
            plugins=plugins,
            taught_champion=heads,
        )

    def _side(self, release: LoadedRelease, taken: Snapshot, *, like: LoadedRelease | None) -> Side:
        """A release that decides by the head that jobs get unless they name one."""
        wanted = self.attempt.settings.head or (None if like is None else like.manifest.default_head)
        head = wanted if wanted in release.heads else release.manifest.default_head
        if head is None:
            raise TrainingError(f"{release.id} has no head to decide with")
        rows = self._see(release.weights, release.encoder_sha256, taken).rows
        return Side(release.id, release.encoder_sha256, release.heads, head, release.manifest.thresholds, rows)

    def _move_alias(self, candidate: str, champion: str | None, reasons: list[str], *, challenge: bool) -> bool:
        asked, challenge = challenge, challenge or not self.attempt.settings.gate.promote
        store = self.attempt.parts.store
        self.report["alias"] = releases.CHALLENGER if challenge else releases.CHAMPION
        if challenge and not asked:
            reasons.append("it became the challenger: CODE_WORKER_GATE__PROMOTE is off")
        elif not challenge:
            stale = store.run(lambda session: stale_scopes(session, candidate), write=False)
            self.report["stale_policies"] = stale
            hint = "`code-worker calibrate --after-promote` draws them again"
            reasons += [f"thresholds of {name} were drawn by another release's scores: {hint}" for name in stale]
        return store.run(
            lambda session: runs.promote(
                session,
                self.attempt.held.lease,
                candidate,
                champion=champion,
                by=self.attempt.run.by,
                reasons=reasons,
                report=self.report,
                challenge=challenge,
            )
        )
