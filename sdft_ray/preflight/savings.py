"""What a sweep builds, shares and finds there already, and what that saves against running each of its recipes alone.

In: a sweep's plan and the storage. Out: counts of stages, and seconds as far as manifests of finished artifacts give
them: an estimate from what was measured, never a guess about what was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_ray import pipeline
from sdft_ray.stages import distill
from sdft_ray.store.identity import Stage
from sdft_ray.store.storage import Storage
from sdft_ray.sweep.planning import Plan, stages_of


def measure(plan: Plan, storage: Storage) -> dict[str, Any]:
    """Return, for each kind of stage, how many a sweep has, how many its recipes alone have, and their seconds."""
    chains = [pipeline.chain(cell.recipe).in_order for cell in plan.cells]
    once = {stage.id: stage for stage in stages_of(plan) if stage.location is None}
    alone = [stage for chain in chains for stage in chain if stage.location is None]
    with storage.survey():
        status = {key: storage.status(stage) for key, stage in once.items()}
    seconds = {
        key: float(storage.manifest(stage)["provenance"]["wall_seconds"])
        for key, stage in once.items()
        if status[key] == "done"
    }
    kinds = []
    for name in pipeline.MODULES:
        mine = [stage for stage in once.values() if stage.name == name]
        theirs = [stage for stage in alone if stage.name == name]
        if mine:
            known = all(stage.id in seconds for stage in mine)
            kinds.append(
                {
                    "stage": name,
                    "alone": len(theirs),
                    "sweep": len(mine),
                    **{
                        state: [status[stage.id] for stage in mine].count(state)
                        for state in ("done", "partial", "missing")
                    },
                    "seconds_sweep": sum(seconds[stage.id] for stage in mine) if known else None,
                    "seconds_alone": sum(_seconds_alone(stage, mine, seconds) for stage in theirs) if known else None,
                }
            )
    return {"recipes": len(plan.cells), "trials": len(plan.trials), "stages": kinds, **_totals(kinds)}


def _seconds_alone(stage: Stage, mine: Sequence[Stage], seconds: Mapping[str, float]) -> float:
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


def _totals(kinds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {key: sum(kind[key] for kind in kinds) for key in ("alone", "sweep", "done")}
    known = [kind for kind in kinds if kind["seconds_sweep"] is not None]
    found["seconds_of"] = [kind["stage"] for kind in known]
    for key in ("seconds_sweep", "seconds_alone"):
        found[key] = sum(kind[key] for kind in known)
    return found


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the counts, and the saving in one line."""
    table = Table("stage", box=None, pad_edge=False)
    for column in ("alone", "sweep", "done", "partial", "missing", "s alone", "s sweep"):
        table.add_column(column, justify="right")
    for kind in found["stages"]:
        counts = (kind[key] for key in ("alone", "sweep", "done", "partial", "missing"))
        times = ("-" if kind[key] is None else f"{kind[key]:.0f}" for key in ("seconds_alone", "seconds_sweep"))
        table.add_row(kind["stage"], *map(str, counts), *times)
    console.print(table)
    share = f"{found['sweep'] / found['alone']:.0%}"
    text = f"{found['recipes']} recipes, {found['trials']} trials: {found['sweep']} stages instead of {found['alone']}"
    text += f" ({share}), {found['done']} of them done."
    if found["seconds_of"]:
        kinds = ", ".join(found["seconds_of"])
        text += f" As measured for {kinds}: {found['seconds_sweep']:.0f} s instead of {found['seconds_alone']:.0f} s."
    console.print(text)
