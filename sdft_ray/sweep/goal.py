"""A sweep with a goal: the deepest cut that keeps enough, found without training every depth.

In: a plan whose cells differ in depth (and seeds), and a goal. Out: the depths that were tried, in order, each with its
recovery and interval, and the one that is chosen. The loss that each depth costs untrained is measured first, and says
where to begin (core/searching.py). Recovery is taken to fall with depth. Nothing is remembered but artifacts: what
comes next follows from what is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sdft_ray import pipeline
from sdft_ray.core.choice import Choice
from sdft_ray.core.recovery import Estimate, recovery_interval
from sdft_ray.core.searching import following, most_trainings
from sdft_ray.engine import EngineFactory, start_engine
from sdft_ray.progress import log
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.sweep import Goal
from sdft_ray.stages.evaluate.scores import item_values
from sdft_ray.store.identity import Stage, ancestors
from sdft_ray.store.record import Record
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import trials
from sdft_ray.sweep.planning import DEPTH, Plan, Trial, check, is_done, make_plan, stages_of


@dataclasses.dataclass(frozen=True)
class Tried:
    """A depth that was trained and evaluated."""

    blocks: int
    recovery: Estimate | None
    """In percent, with its 95 % interval over items; None where the base scores nothing."""
    seeds: int
    meets: bool
    """Whether the lower end of the interval reaches the goal."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How far the search is."""

    tried: tuple[Tried, ...]
    """In the order in which they were trained."""
    following: int | None
    """The depth that is trained next; None at the end."""
    depths: tuple[int, ...]
    """All of them, ascending."""

    @property
    def chosen(self) -> Tried | None:
        """The deepest one that meets the goal, where the search is at its end."""
        met = [each for each in self.tried if each.meets]
        return max(met, key=lambda each: each.blocks) if met and self.following is None else None


def run(plan: Plan, compute: Compute, storage: Storage, engine: EngineFactory = start_engine) -> pipeline.Built:
    """Build a sweep: all of it, or where it has a goal one depth after another until that is decided.

    Raises as `trials.run` does.
    """
    if plan.goal is None:
        return trials.run(plan, compute, storage, engine)
    check(plan, compute)
    new = [*pipeline.build(_signalling(plan), compute, storage, engine=engine).new]
    while True:
        search = replay(plan, storage)
        if search.tried:
            log(f"goal: {describe(plan, search.tried[-1])}")
        if search.following is None:
            return pipeline.Built(tuple(new), tuple(stages_of(tried_part(plan, search))))
        log(f"goal: tries {search.following} blocks, {len(search.tried)} of {len(search.depths)} depths are tried")
        new += trials.run(at_depths(plan, [search.following]), compute, storage, engine).new


def replay(plan: Plan, storage: Storage) -> Search:
    """Return what was tried so far, and what comes next."""
    assert plan.goal
    depths = tuple(sorted({cell.values[DEPTH] for cell in plan.cells}))
    tried: list[Tried] = []
    signals, measured = read_signals(plan, storage), dict[int, float]()
    while (number := following(signals, measured, plan.goal.recovery, len(depths))) is not None:
        own = [trial for trial in plan.trials if trial.cell.values[DEPTH] == depths[number]]
        if not all(is_done(trial, storage) for trial in own):
            return Search(tuple(tried), depths[number], depths)
        tried.append(_judge(plan.goal, depths[number], own, storage))
        measured[number] = tried[-1].recovery.low if tried[-1].recovery else 0.0
    return Search(tuple(tried), None, depths)


def read_signals(plan: Plan, storage: Storage) -> list[float] | None:
    """Return the loss that each depth costs untrained, in nats a token, the shallowest first; None where that is not
    measured, or not yet."""
    stages = [chain.loss for chain in _chains(plan)]
    if not all(stage and storage.status(stage) == "done" for stage in stages):
        return None
    losses = [_Losses.model_validate(storage.manifest(stage).summary) for stage in stages if stage]
    return [each.choice.value - each.base_loss for each in losses]


class _Losses(Record):
    """What both kinds of loss artifacts say."""

    base_loss: float
    choice: Choice


def _signalling(plan: Plan) -> list[Stage[Any]]:
    """Return the stages that measure the loss of every depth, in an order of building."""
    chains = _chains(plan)
    if not all(chain.loss for chain in chains):
        return []
    needed = {stage.id for chain in chains if chain.loss for stage in (chain.loss, *ancestors([chain.loss]))}
    return list({stage.id: stage for chain in chains for stage in chain.in_order if stage.id in needed}.values())


def _chains(plan: Plan) -> list[pipeline.Chain]:
    """Return a chain of each depth, the shallowest first."""
    cells = {cell.values[DEPTH]: cell for cell in plan.cells}
    return [pipeline.chain(cell.recipe) for _, cell in sorted(cells.items())]


def at_depths(plan: Plan, depths: Sequence[int]) -> Plan:
    """Return the part of a plan that cuts at some depths."""
    cells = [cell for cell in plan.cells if cell.values[DEPTH] in depths]
    return dataclasses.replace(make_plan(cells), goal=plan.goal, part_of=plan.name)


def tried_part(plan: Plan, search: Search) -> Plan:
    """Return the part of a plan that was tried; of a search that has not begun all of it."""
    return at_depths(plan, [each.blocks for each in search.tried]) if search.tried else plan


def describe(plan: Plan, tried: Tried) -> str:
    """Return in words what came of a depth."""
    assert plan.goal
    found = "the base scores nothing"
    if tried.recovery:
        found = f"recovery {tried.recovery.value:.1f} % [{tried.recovery.low:.1f}, {tried.recovery.high:.1f}]"
    verdict = "meets" if tried.meets else "misses"
    return f"{tried.blocks} blocks: {found}, which {verdict} {plan.goal.recovery:g} %"


def describe_search(plan: Plan) -> str:
    """Return in words what the search will take at most."""
    assert plan.goal
    depths = len({cell.values[DEPTH] for cell in plan.cells})
    text = f"Goal: at most {most_trainings(depths)} of {depths} depths are trained"
    text += ", after the loss of each was measured" if _signalling(plan) else ""
    return f"{text}. What is counted below is that of all of them."


def _judge(wanted: Goal, blocks: int, trials: Sequence[Trial], storage: Storage) -> Tried:
    base = pipeline.chain(trials[0].cell.recipe).tasks_of("base")
    models = [trial.evaluations for trial in trials]
    found = recovery_interval(item_values(models, storage), item_values([base], storage))
    return Tried(blocks, found, len(trials), found is not None and found.low >= wanted.recovery)
