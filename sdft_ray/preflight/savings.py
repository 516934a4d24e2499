"""What a sweep builds, shares and finds there already, and what that saves against running each of its recipes alone.

In: a sweep's plan and the storage. Out: counts of stages, and seconds as far as manifests of finished artifacts give
them: an estimate from what was measured, never a guess about what was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_ray import pipeline
from sdft_ray.stages import distill
from sdft_ray.store.identity import Stage
from sdft_ray.store.record import Record
from sdft_ray.store.storage import STATES, Storage
from sdft_ray.sweep.planning import Plan, stages_of


class Kind(Record):
    """The stages of one kind: how many, and the seconds that they take where all of them are done."""

    stage: str
    alone: int
    """In recipes of their own."""
    sweep: int
    done: int
    partial: int
    missing: int
    seconds_sweep: float | None
    seconds_alone: float | None


class Savings(Record):
    """What a sweep saves."""

    recipes: int
    trials: int
    stages: tuple[Kind, ...]
    alone: int
    sweep: int
    done: int
    seconds_of: tuple[str, ...]
    """The kinds of stages whose seconds are known."""
    seconds_sweep: float
    seconds_alone: float


def measure(plan: Plan, storage: Storage) -> Savings:
    """Return, for each kind of stage, how many a sweep has, how many its recipes alone have, and their seconds."""
    chains = [pipeline.chain(cell.recipe).in_order for cell in plan.cells]
    once = {stage.id: stage for stage in stages_of(plan) if stage.location is None}
    alone = [stage for chain in chains for stage in chain if stage.location is None]
    with storage.survey():
        status = {key: storage.status(stage) for key, stage in once.items()}
    done = {key: stage for key, stage in once.items() if status[key] == "done"}
    seconds = {key: storage.manifest(stage).provenance.wall_seconds for key, stage in done.items()}
    kinds = []
    for name in pipeline.MODULES:
        mine = [stage for stage in once.values() if stage.name == name]
        if mine:
            kinds.append(_count(mine, [stage for stage in alone if stage.name == name], status, seconds))
    return Savings(
        recipes=len(plan.cells),
        trials=len(plan.trials),
        stages=tuple(kinds),
        alone=sum(kind.alone for kind in kinds),
        sweep=sum(kind.sweep for kind in kinds),
        done=sum(kind.done for kind in kinds),
        seconds_of=tuple(kind.stage for kind in kinds if kind.seconds_sweep is not None),
        seconds_sweep=sum(kind.seconds_sweep or 0 for kind in kinds),
        seconds_alone=sum(kind.seconds_alone or 0 for kind in kinds),
    )


def _count(
    mine: Sequence[Stage[Any]], theirs: Sequence[Stage[Any]], status: Mapping[str, str], seconds: Mapping[str, float]
) -> Kind:
    """Return the counts of the stages of one kind; mine: of the sweep, theirs: of its recipes alone."""
    known = all(stage.id in seconds for stage in mine)
    states = Counter(status[stage.id] for stage in mine)
    return Kind(
        stage=mine[0].name,
        alone=len(theirs),
        sweep=len(mine),
        **{state: states[state] for state in STATES},
        seconds_sweep=sum(seconds[stage.id] for stage in mine) if known else None,
        seconds_alone=sum(_seconds_alone(stage, mine, seconds) for stage in theirs) if known else None,
    )


def _seconds_alone(stage: Stage[Any], mine: Sequence[Stage[Any]], seconds: Mapping[str, float]) -> float:
    """Return what a stage would take in a recipe of its own.

    A sweep generates at the largest size and then only selects: alone, a smaller size would take its share of rows.
    """
    if isinstance(stage.settings, distill.Settings) and (rows := stage.settings.rows):
        family = [other for other in mine if _at_all_sizes(other) == _at_all_sizes(stage)]
        sizes = [other.settings.rows for other in family]
        if None not in sizes:
            return max(seconds[other.id] for other in family) * rows / max(sizes)
    return seconds[stage.id]


def _at_all_sizes(stage: Stage[distill.Settings]) -> dict[str, Any]:
    return {**stage.settings.hashed(), "rows": None}


def show(saved: Savings, console: Console) -> None:
    """Print the counts, and the saving in one line."""
    table = Table("stage", box=None, pad_edge=False)
    for column in ("alone", "sweep", "done", "partial", "missing", "seconds alone", "seconds sweep"):
        table.add_column(column, justify="right")
    for kind in saved.stages:
        counts = (kind.alone, kind.sweep, kind.done, kind.partial, kind.missing)
        times = ("-" if time is None else f"{time:.0f}" for time in (kind.seconds_alone, kind.seconds_sweep))
        table.add_row(kind.stage, *map(str, counts), *times)
    console.print(table)
    text = f"Recipes: {saved.recipes}, trials: {saved.trials}, stages: {saved.sweep} instead of {saved.alone}"
    text += f" ({saved.sweep / saved.alone:.0%}), {saved.done} of them done."
    if saved.seconds_of:
        text += f" As measured for {', '.join(saved.seconds_of)}: {saved.seconds_sweep:.0f} s"
        text += f" instead of {saved.seconds_alone:.0f} s."
    console.print(text)
