"""Gathers what the report of a sweep shows.

In: a sweep's plan and the storage. Out: a `SweepReport`. Trials that are not there are listed too, with the reason
where one failed: it is looked at while it grows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sdft_ray import pipeline
from sdft_ray.core.speculation import acceptance_error, worth
from sdft_ray.errors import UserError, problem
from sdft_ray.report.collect import (
    FLOPS_TOKENS,
    Evaluations,
    compare_arms,
    count_cost,
    describe_quality,
    describe_retention,
    describe_trial_sources,
)
from sdft_ray.report.entries import Draft, Pruned, Speed, Trained
from sdft_ray.report.seeds import mean, mean_retention, mean_sources, spread
from sdft_ray.report.sweep_entries import (
    DraftEntry,
    DraftFigures,
    DraftWorth,
    GoalEntry,
    Group,
    Map,
    Place,
    SweepComparison,
    SweepModel,
    SweepReport,
    TrialEntry,
    TrialResult,
    Untried,
)
from sdft_ray.results import DISTANCES, Distances, Drafted
from sdft_ray.spec.training import ARMS
from sdft_ray.stages import cut, distill, patch, retention, speed
from sdft_ray.stages.draft import candidate
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import goal, notes
from sdft_ray.sweep.planning import DEPTH, SIZE, Plan, Trial, describe_stopped, is_done, is_seed, name_draft
from sdft_ray.training_data import count_rows


def collect(plan: Plan, name: str, storage: Storage) -> SweepReport:
    """Return everything that the report of a sweep shows; raises UserError where there is no base to compare with."""
    looked_for = {}
    if plan.goal:
        search = goal.replay(plan, storage)
        looked_for = {"goal": _describe_goal(plan, search)}
        plan = goal.tried_part(plan, search)
    untuned = _Untuned.of(plan)
    untuned.require_done(name, storage)
    with storage.survey():
        tried, untried = _read_drafts(plan, storage)
        entries = [_describe_trial(trial, plan.name, untuned, tried, storage) for trial in plan.trials]
    groups, teachers = _group(entries), untuned.teachers
    return SweepReport(
        sweep=name,
        axes=tuple(dict.fromkeys(path for cell in plan.cells for path in cell.values)),
        tasks=plan.cells[0].recipe.evaluate.tasks,
        models=untuned.describe(storage),
        trials=tuple(entries),
        groups=groups,
        comparisons=tuple(_compare(groups, plan.trials, storage)),
        drafts=_describe_drafts(groups, entries, {key: untuned.depth_of(key, storage) for key in untuned.cuts}, tried),
        untried=tuple(untried),
        maps=_read_maps(untuned.cuts.values(), storage),
        flops_tokens=FLOPS_TOKENS,
        **looked_for,
        **({"teachers": teachers} if teachers else {}),
    )


def _describe_goal(plan: Plan, search: goal.Search) -> GoalEntry:
    assert plan.goal
    return GoalEntry(
        wanted=plan.goal.wanted,
        keeps=plan.goal.recovery is not None,
        arm=plan.goal.arm,
        chosen=search.chosen.blocks if search.chosen else None,
        following=search.following,
        depths=search.depths,
        lines=tuple(goal.describe(plan, each) for each in search.tried),
    )


@dataclasses.dataclass(frozen=True)
class _Untuned:
    """The bases and pruned models of a sweep, by id, with what was measured of them."""

    chains: tuple[pipeline.Chain, ...]

    @classmethod
    def of(cls, plan: Plan) -> _Untuned:
        return cls(tuple(pipeline.chain(cell.recipe) for cell in plan.cells))

    @property
    def teachers(self) -> tuple[str, ...]:
        """The models that rewrite, where they are not the base."""
        names = (distill.teacher_name(chain.distilled) for chain in self.chains if chain.distilled)
        return tuple(dict.fromkeys(filter(None, names)))

    @functools.cached_property
    def cuts(self) -> dict[str, cut.CutStage]:
        """The pruned models."""
        return {chain.pruned.id: chain.pruned for chain in self.chains}

    def _models(self) -> Iterator[tuple[str, Stage[Any], pipeline.Chain]]:
        """Yield the name, the stage and the chain of each base, pruned and patched model."""
        for chain, name in itertools.product(self.chains, ("base", "pruned", "patched")):
            if name in chain.models:
                yield name, chain.models[name], chain

    @functools.cached_property
    def evaluations(self) -> dict[str, Evaluations]:
        """For each base, pruned and patched model its evaluations, by task."""
        return {stage.id: chain.tasks_of(name) for name, stage, chain in self._models()}

    @functools.cached_property
    def retentions(self) -> dict[str, Stage[retention.Settings]]:
        """How near each of them stays to the base, where the recipe asks for that."""
        return {stage.id: kept for name, stage, chain in self._models() if (kept := chain.retention.get(name))}

    @functools.cached_property
    def bases(self) -> dict[str, Stage[Any]]:
        """For each pruned and patched model its base."""
        starts = [(stage, chain) for chain in self.chains for stage in (chain.pruned, chain.patched) if stage]
        return {stage.id: chain.base for stage, chain in starts}

    @functools.cached_property
    def patched(self) -> dict[str, tuple[Stage[patch.Settings], cut.CutStage]]:
        """The patched models, each with the pruned one."""
        return {chain.patched.id: (chain.patched, chain.pruned) for chain in self.chains if chain.patched}

    @functools.cached_property
    def speeds(self) -> dict[str, Stage[speed.Settings]]:
        """For each pruned model that was timed, the stage; a patched one, of the same shapes, is as fast."""
        timed = [
            (start, chain.speed) for chain in self.chains for start in (chain.pruned, chain.patched) if chain.speed
        ]
        return {start.id: stage for start, stage in timed if start}

    def depth_of(self, start: str, storage: Storage) -> int:
        """Return how many blocks a pruned or patched model lacks."""
        return len(Pruned.of(self.patched[start][1] if start in self.patched else self.cuts[start], storage).removed)

    def base_of(self, pruned: str) -> Evaluations:
        """Return the evaluations of the base of a pruned model."""
        return self.evaluations[self.bases[pruned].id]

    def require_done(self, name: str, storage: Storage) -> None:
        """Raise UserError where something is missing that trials are compared with."""
        needed: list[Stage[Any]] = [*self.speeds.values(), *self.retentions.values()]
        for chain in self.chains:
            needed += [chain.rows, *([chain.score] if chain.score else []), *self.evaluations[chain.base.id].values()]
            for stage in (chain.pruned, chain.patched):
                needed += [stage, *self.evaluations[stage.id].values()] if stage else []
        if missing := {stage.name for stage in pipeline.survey(needed, storage)[0]}:
            what = f"has nothing to compare with under {storage.uri} (missing: {', '.join(sorted(missing))})"
            raise UserError(problem(name, what, f"Do: sdft sweep {name}"))

    def describe(self, storage: Storage) -> tuple[SweepModel, ...]:
        """Return one entry for each base, and for each pruned model."""
        bases = {base.id: base for base in self.bases.values()}
        models = [self._describe(base, base.id, storage, model="base", blocks=0) for base in bases.values()]
        made: list[tuple[str, Stage[Any], cut.CutStage]] = [("pruned", each, each) for each in self.cuts.values()]
        made += [("patched", *both) for both in self.patched.values()]
        for name, stage, cut_of in made:
            pruned, where = Pruned.of(cut_of, storage), storage.where(stage)
            more = {"model": name, "blocks": len(pruned.removed), "directory": where, "cut": pruned}
            models.append(self._describe(stage, self.bases[stage.id].id, storage, **more))
        return tuple(models)

    def _describe(self, stage: Stage[Any], base: str, storage: Storage, **more: Any) -> SweepModel:
        return SweepModel(
            **more,
            slug=stage.slug,
            speed=Speed.of(self.speeds[stage.id], storage) if stage.id in self.speeds else None,
            id=stage.id,
            quality=describe_quality(self.evaluations[stage.id], self.evaluations[base], storage),
            cost=count_cost(storage.files(stage, "config.json")),
            **describe_retention(self.retentions.get(stage.id), storage),
        )


def _describe_trial(
    trial: Trial, sweep: str, untuned: _Untuned, tried: Mapping[str, Sequence[Draft]], storage: Storage
) -> TrialEntry:
    """Return where a trial lies in the sweep, how far it is and, where it is done, what came of it."""
    pruned, recipe = trial.train.model, trial.cell.recipe
    stopped, reason = notes.read_stopped(storage, sweep, trial.train), notes.read_failure(storage, trial.train)
    done = is_done(trial, storage)
    return TrialEntry(
        arm=trial.arm,
        blocks=untuned.depth_of(pruned.id, storage),
        rows=recipe.train.rows or count_rows(trial.train.rows, storage).train,
        values={path: value for path, value in trial.values.items() if path not in (DEPTH, SIZE)},
        id=trial.train.id,
        directory=storage.where(trial.train),
        status="done" if done else "stopped" if stopped else "failed" if reason else "missing",
        reason=None if done else describe_stopped(stopped) if stopped else reason,
        pruned=pruned.id,
        result=TrialResult(
            validation_loss=Trained.of(trial.train, storage).validation_loss,
            seconds=storage.manifest(trial.train).provenance.wall_seconds,
            quality=describe_quality(trial.evaluations, untuned.base_of(pruned.id), storage),
            cost=count_cost(storage.files(pruned, "config.json")),
            **describe_retention(trial.retention, storage),
            **describe_trial_sources(trial.train, trial.evaluations, storage),
        )
        if done
        else None,
        draft=_join_drafts(tried[trial.train.id]) if trial.train.id in tried else None,
    )


def _group(entries: Sequence[TrialEntry]) -> tuple[Group, ...]:
    """Return the finished trials, those that differ in seeds alone as one, with the mean and the spread over seeds.

    Chosen among those of one recipe, base and rows, arm, depth and size is the one of the lowest validation loss, never
    of the best score.
    """
    members: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        if entry.result:
            members.setdefault(json.dumps([entry.arm, entry.blocks, entry.rows, _unseeded(entry)]), []).append(i)
    groups = [_join_trials(entries, each) for each in members.values()]
    best: dict[tuple[Any, ...], Group] = {}
    for group in groups:
        rival = best.setdefault(_point(group), group)
        if _loss(group) < _loss(rival):
            best[_point(group)] = group
    chosen = [group.model_copy(update={"chosen": best[_point(group)] is group}) for group in groups]
    return tuple(sorted(chosen, key=lambda group: (group.blocks, group.rows, ARMS.index(group.arm))))


def _join_trials(entries: Sequence[TrialEntry], members: Sequence[int]) -> Group:
    first = entries[members[0]]
    results = [result for i in members if (result := entries[i].result)]
    qualities = [result.quality for result in results]
    recoveries = [quality.recovery for quality in qualities]
    return Group(
        arm=first.arm,
        blocks=first.blocks,
        rows=first.rows,
        values=_unseeded(first),
        trials=tuple(members),
        mean=statistics.fmean(quality.mean for quality in qualities),
        recovery=mean(recoveries),
        recovery_sd=spread(recoveries),
        recovery_over_chance=mean([quality.recovery_over_chance for quality in qualities]),
        validation_loss=mean([result.validation_loss for result in results]),
        parameters=results[0].cost.parameters,
        **mean_retention(results),
        **mean_sources(results),
        pruned=first.pruned,
        limited=any(quality.limited for quality in qualities),
        chosen=False,
    )


def _unseeded(entry: TrialEntry) -> dict[str, Any]:
    return {path: value for path, value in entry.values.items() if not is_seed(path)}


def _loss(group: Group) -> float:
    return float("inf") if group.validation_loss is None else group.validation_loss


def _point(place: Place) -> tuple[Any, ...]:
    return place.of, place.arm, place.blocks, place.rows


def _compare(groups: Sequence[Group], trials: Sequence[Trial], storage: Storage) -> Iterable[SweepComparison]:
    """Yield, for each depth and size, how much better each arm does than the one before it on the same items."""
    chosen = {_point(group): group for group in groups if group.chosen}
    for recipe, blocks, size in dict.fromkeys((recipe, blocks, size) for recipe, _, blocks, size in chosen):
        points = {arm: (recipe, arm, blocks, size) for arm in ARMS}
        both = {arm: chosen[point].trials for arm, point in points.items() if point in chosen}
        evaluations = {arm: [trials[i].evaluations for i in members] for arm, members in both.items()}
        for compared in compare_arms(evaluations, storage):
            seeds = {arm: len(members) for arm, members in both.items() if arm in (compared.first, compared.second)}
            yield SweepComparison(recipe=recipe or None, blocks=blocks, rows=size, seeds=seeds, compared=compared)


def _read_drafts(plan: Plan, storage: Storage) -> tuple[dict[str, list[Draft]], list[Untried]]:
    """Return what was measured of each model as a draft, by its id; and the drafts that are still to be tried, where
    their model is there."""
    tried: dict[str, list[Draft]] = {}
    untried = []
    for stage in plan.drafts:
        model = candidate(stage)
        if storage.status(stage) == "done":
            tried.setdefault(model.id, []).append(Draft.of(stage, storage))
        elif storage.status(model) == "done":
            reason = notes.read_failure(storage, stage)
            name = name_draft(stage, plan)
            untried.append(Untried(draft=name, status="failed" if reason else "missing", reason=reason))
    return tried, untried


def _describe_drafts(
    groups: Sequence[Group],
    entries: Sequence[TrialEntry],
    depths: Mapping[str, int],
    tried: Mapping[str, Sequence[Draft]],
) -> tuple[DraftEntry, ...]:
    """Return what each pruned model and each group of trials is worth as a draft of the base, by depth."""
    models: list[tuple[dict[str, Any], list[str]]] = [
        ({"arm": "pruned", "blocks": depth, "rows": None, "values": {}, "chosen": True}, [key])
        for key, depth in depths.items()
    ]
    models += [
        (group.model_dump(include={"arm", "blocks", "rows", "values", "chosen"}), [entries[i].id for i in group.trials])
        for group in groups
    ]
    drafts = [
        DraftEntry(**place, drafts=len(each), worth=_join_drafts(each))
        for place, ids in models
        if (each := [draft for key in ids for draft in tried.get(key, ())])
    ]
    return tuple(sorted(drafts, key=lambda draft: draft.blocks))


def _join_drafts(drafts: Sequence[Draft]) -> DraftWorth:
    """Return the figures of a draft, or of several that differ in their seeds: their tokens are counted together.

    Acceptance is that of the largest number of drafted tokens, which is the same for all models; speeds are those of
    the best measured number.
    """
    cost = statistics.fmean(draft.cost for draft in drafts)
    return DraftWorth(
        cost=cost,
        greedy=_join_texts([draft.greedy for draft in drafts], cost),
        sampled=_join_texts([draft.sampled for draft in drafts], cost),
    )


def _join_texts(drafted: Sequence[Drafted], cost: float) -> DraftFigures:
    measured = []
    for same in zip(*(each.measured for each in drafted), strict=True):
        accepted = [sum(each) for each in zip(*(one.accepted for one in same), strict=True)]
        counts = sum(one.drafts for one in same), accepted
        measured.append(
            DraftFigures(
                tokens=same[0].tokens,
                speedup=statistics.fmean(one.speedup for one in same),
                speedup_min=min(one.speedup_min for one in same),
                speedup_max=max(one.speedup_max for one in same),
                **vars(worth(*counts, cost)),
                acceptance_error=acceptance_error(*counts),
            )
        )
    best, largest = max(measured, key=lambda one: one.speedup), measured[-1]
    return best.model_copy(update={"acceptance": largest.acceptance, "acceptance_error": largest.acceptance_error})


def _read_maps(cuts: Iterable[cut.CutStage], storage: Storage) -> list[Map]:
    """Return the distances of every scoring, each with the blocks that were removed by it."""
    scores: dict[str, Stage[Any]] = {}
    removed: dict[str, list[Sequence[int]]] = {}
    for stage in cuts:
        if not (score := stage.inputs.get("score")):
            continue
        score = scores.setdefault(score.id, score)
        removed.setdefault(score.id, []).append(Pruned.of(stage, storage).removed)
    return [
        Map(Distances.from_file(storage.files(score, DISTANCES) / DISTANCES), removed[key])
        for key, score in scores.items()
    ]
