"""The ids of every shipped recipe and sweep, as they were last agreed on: one that moves costs its users what it names.

In: configs/. Out: pinned_ids.json beside this file. `python -m tests.pin` writes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from sdft_ray import pipeline
from sdft_ray.spec.loading import load_recipe
from sdft_ray.store.identity import Stage, short_id
from sdft_ray.sweep import planning

CONFIGS = Path(__file__).parents[1] / "configs"
PINNED = Path(__file__).with_name("pinned_ids.json")


def plan_ids() -> dict[str, list[str]]:
    """Return, for each recipe, each stage with its id; for each sweep, one id over those of each kind of stage."""
    found = {}
    for path in sorted((CONFIGS / "recipes").glob("*.yaml")):
        plan = pipeline.chain(load_recipe(path)).in_order
        found[f"recipes/{path.stem}"] = [f"{stage.name}/{stage.directory_name}" for stage in plan]
    for path in sorted((CONFIGS / "sweeps").glob("*.yaml")):
        found[f"sweeps/{path.stem}"] = _by_kind(planning.stages_of(planning.load_sweep(path)))
    return found


def read_ids() -> dict[str, list[str]]:
    """Return the pinned ids."""
    return dict(json.loads(PINNED.read_text()))


def _by_kind(stages: Iterable[Stage]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for stage in stages:
        kinds.setdefault(stage.name, []).append(stage.id)
    return [f"{len(ids)} x {name}: {short_id(sorted(ids))}" for name, ids in kinds.items()]


if __name__ == "__main__":
    PINNED.write_text(json.dumps(plan_ids(), indent=1) + "\n")
