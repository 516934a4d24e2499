"""A sweep with a goal: the one depth that reaches it, found without training every depth.

In: a plan whose cells differ in depth (and seeds), and a goal. Out: the depths that were tried, in order, and the one
that is chosen. For the deepest cut that keeps enough, the loss that each depth costs untrained is measured first, and
says where to begin (core/searching.py); recovery is taken to fall with depth. For the least deep cut that is small or
fast enough, depths are cut and measured, and that one alone is trained. Nothing is remembered but artifacts: what comes
next follows from what is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sdft_ray import pipeline
from sdft_ray.core.choice import Choice
from sdft_ray.core.recovery import Estimate, recovery_interval
from sdft_ray.core.searching import following, halvings, most_trainings
from sdft_ray.engine import EngineFactory, start_engine
from sdft_ray.errors import UserError, counted, problem
from sdft_ray.progress import log
from sdft_ray.spec.compute import Compute
from sdft_ray.spec.sweep import Goal
from sdft_ray.stages import cut, speed
from sdft_ray.stages.evaluate.scores import item_values
from sdft_ray.store.identity import Stage, ancestors
from sdft_ray.store.record import Record
from sdft_ray.store.storage import Storage
from sdft_ray.sweep import trials
from sdft_ray.sweep.planning import DEPTH, Plan, Trial, check, is_done, make_plan, stages_of


@dataclasses.dataclass(frozen=True)
class Tried:
    """A depth that was trained and evaluated, or measured."""

    blocks: int
    recovery: Estimate | None
    """In percent, with its 95 % interval over items; None where the base scores nothing, or where none was trained."""
    seeds: int
    """That were trained."""
    meets: bool
    """Whether the lower end of the interval, or the size, reaches the goal."""
    size: float | None = None
    """Parameters, or tokens per second over the base's, of a goal that asks for these."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How far the search is."""

    tried: tuple[Tried, ...]
    """In the order in which they were trained."""
    following: int | None
    """The depth that is trained next; None at the end."""
    depths: tuple[int, ...]
    """All of them, ascending."""
    chosen: Tried | None = None
    """The one that the goal asks for, where the search is at its end and some depth reaches it."""
    is_training: bool = True
    """Whether the next depth is trained, and not only measured."""


def run(plan: Plan, compute: Compute, storage: Storage, engine: EngineFactory = start_engine) -> pipeline.Built:
    """Build a sweep: all of it, or where it has a goal one depth after another until that is decided.

    Raises as `trials.run` does.
    """
    if plan.goal is None:
        return trials.run(plan, compute, storage, engine)
    check(plan, compute)
    first = _signalling(plan) if plan.goal.recovery else []
    new = [*pipeline.build(first, compute, storage, engine=engine).new]
    while True:
        search = replay(plan, storage)
        if search.tried:
            log(f"goal: {describe(plan, search.tried[-1])}")
        if search.following is None:
            return pipeline.Built(tuple(new), tuple(stages_of(tried_part(plan, search))))
        tried = f"{len(search.tried)} of {len(search.depths)} depths are tried"
        log(f"goal: tries {counted(search.following, 'block')}, {tried}")
        if search.is_training:
            new += trials.run(at_depths(plan, [search.following]), compute, storage, engine).new
        else:
            new += pipeline.build(_sizing(plan, search.following), compute, storage, engine=engine).new


def replay(plan: Plan, storage: Storage) -> Search:
    """Return what was tried so far, and what comes next."""
    assert plan.goal
    depths = tuple(sorted({cell.values[DEPTH] for cell in plan.cells}))
    if plan.goal.recovery is None:
        return _replay_sizes(plan, plan.goal, depths, storage)
    tried: list[Tried] = []
    signals, measured = read_signals(plan, storage), dict[int, float]()
    while (number := following(signals, measured, plan.goal.recovery, len(depths))) is not None:
        own = _trials_at(plan, depths[number])
        if not all(is_done(trial, storage) for trial in own):
            return Search(tuple(tried), depths[number], depths)
        tried.append(_judge(plan.goal, depths[number], own, storage))
        measured[number] = tried[-1].recovery.low if tried[-1].recovery else 0.0
    met = [each for each in tried if each.meets]
    return Search(tuple(tried), None, depths, max(met, key=lambda each: each.blocks, default=None))


def _replay_sizes(plan: Plan, wanted: Goal, depths: tuple[int, ...], storage: Storage) -> Search:
    """Return `replay` of a goal that no training decides: the least depth that reaches it is trained afterwards."""
    tried: dict[int, Tried] = {}
    while True:
        number = following(None, {i: float(not each.meets) for i, each in tried.items()}, 0.5, len(depths))
        if number is None:
            break
        measured = _size(wanted, _chains(plan)[number], storage)
        if measured is None:
            return Search(tuple(tried.values()), depths[number], depths, is_training=False)
        reaches = measured <= wanted.parameters if wanted.parameters else measured >= (wanted.tokens_per_second or 0)
        tried[number] = Tried(depths[number], None, 0, reaches, measured)
    if (first := min((i for i, each in tried.items() if each.meets), default=None)) is None:
        return Search(tuple(tried.values()), None, depths)
    own = _trials_at(plan, depths[first])
    if not all(is_done(trial, storage) for trial in own):
        return Search(tuple(tried.values()), depths[first], depths)
    trained = _judge(wanted, depths[first], own, storage)
    chosen = dataclasses.replace(tried.pop(first), recovery=trained.recovery, seeds=trained.seeds)
    return Search((*tried.values(), chosen), None, depths, chosen)


def _size(wanted: Goal, chain: pipeline.Chain, storage: Storage) -> float | None:
    """Return the parameters of a pruned model, or how fast it is; None where that is not known yet."""
    stage = chain.pruned if wanted.parameters else chain.speed
    if stage is None or storage.status(stage) != "done":
        return None
    if wanted.parameters:
        return cut.Summary.of(stage, storage).parameters
    return speed.Summary.of(stage, storage).decode.ratio_min


def _sizing(plan: Plan, blocks: int) -> list[Stage[Any]]:
    """Return the stages that measure the size of the pruned model at a depth, in an order of building."""
    assert plan.goal
    (chain,) = _chains(at_depths(plan, [blocks]))
    last = chain.pruned if plan.goal.parameters else chain.speed
    return _up_to([chain], [last] if last else [])


def _trials_at(plan: Plan, blocks: int) -> list[Trial]:
    return [trial for trial in plan.trials if trial.cell.values[DEPTH] == blocks]


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
    return _up_to(chains, [chain.loss for chain in chains if chain.loss])


def _up_to(chains: Sequence[pipeline.Chain], last: Sequence[Stage[Any]]) -> list[Stage[Any]]:
    """Return some stages of chains and all that they are made from, each once, in an order of building."""
    needed = {stage.id for stage in (*last, *ancestors(last))}
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
    """Return the part of a plan that was trained; of a search that has not begun to all of it. Raises UserError where
    no depth is small or fast enough to be trained."""
    trained = [each.blocks for each in search.tried if each.seeds]
    if search.following is None and not trained:
        deepest = max(search.tried, key=lambda each: each.blocks)
        what = f"no depth reaches it, not even the deepest ({describe(plan, deepest)})"
        raise UserError(problem("goal", what, "List deeper cuts in axes.prune.blocks, or ask for less"))
    return at_depths(plan, trained) if trained else plan


def describe(plan: Plan, tried: Tried) -> str:
    """Return in words what came of a depth."""
    assert plan.goal
    found = "the base scores nothing"
    if tried.recovery:
        found = f"recovery {tried.recovery.value:.1f} % [{tried.recovery.low:.1f}, {tried.recovery.high:.1f}]"
    verdict = f"which {'meets' if tried.meets else 'misses'} {plan.goal.wanted}"
    if tried.size is None:
        return f"{counted(tried.blocks, 'block')}: {found}, {verdict}"
    size = f"{tried.size:,.0f} parameters" if plan.goal.parameters else f"{tried.size:.2f} times as fast"
    return f"{counted(tried.blocks, 'block')}: {size}, {verdict}" + (f"; {found}" if tried.seeds else "")


def describe_search(plan: Plan) -> str:
    """Return in words what the search will take at most."""
    assert plan.goal
    depths, counted = len({cell.values[DEPTH] for cell in plan.cells}), "What is counted below is that of all of them."
    if plan.goal.recovery is None:
        return f"Goal: at most {halvings(depths)} of {depths} depths are cut and measured, one is trained. {counted}"
    if _signalling(plan):
        most = f"{most_trainings(depths)} of {depths} depths are trained, after the loss of each was measured"
    else:
        most = f"{halvings(depths)} of {depths} depths are trained"
    return f"Goal: at most {most}. {counted}"


def _judge(wanted: Goal, blocks: int, trials: Sequence[Trial], storage: Storage) -> Tried:
    base = pipeline.chain(trials[0].cell.recipe).tasks_of("base")
    models = [trial.evaluations for trial in trials]
    found = recovery_interval(item_values(models, storage), item_values([base], storage))
    return Tried(blocks, found, len(trials), found is not None and found.low >= (wanted.recovery or 0))
