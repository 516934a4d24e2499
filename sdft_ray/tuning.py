"""The stages that make the tuned models of a recipe: its arms, what is merged of them, and the wholes around them.

In: a recipe, the model that training starts from, and training data. Out: stages by the names of their models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdft_ray.spec.recipe import Merge, Recipe
from sdft_ray.spec.sources import LocalModel
from sdft_ray.stages import merge, model, train, whole
from sdft_ray.store.identity import Stage
from sdft_ray.training_data import Data


def tuned_models(
    recipe: Recipe, base: Stage[Any], start: Stage[Any], data: Mapping[str, Data]
) -> dict[str, Stage[Any]]:
    """Return the arms and the merged models, with all that these are merged from.

    start: the pruned or patched model. data: the recipe's own under "", others by the names of their models.
    """

    def train_in(arm: str, inputs: Sequence[Mapping[str, Any]], other: str = "") -> Stage[train.Settings]:
        soft = recipe.arms.logits.soft if arm == "logits" and recipe.arms.logits else None
        return train.stage(recipe.train_settings(arm, other), arm, start, inputs, soft, base)

    models: dict[str, Stage[Any]] = {arm: train_in(arm, [data[""].inputs]) for arm in recipe.arms.names}
    if recipe.merge:
        models |= _merged(recipe.merge, start, models[recipe.merge.arm], data, train_in)
    return models


def _merged(
    settings: Merge,
    start: Stage[Any],
    first: Stage[Any],
    data: Mapping[str, Data],
    train_in: Callable[..., Stage[train.Settings]],
) -> dict[str, Stage[Any]]:
    """Return the models that are merged with an arm's, one trained on all of their rows, and the merged ones."""
    models: dict[str, Stage[Any]] = {}
    for name, other in settings.others.items():
        if other.path is None:
            models[name] = train_in(settings.arm, [data[name].inputs], name)
        else:
            models[name] = model.stage(LocalModel(path=other.path), f"merge.others.{name}.path")
    parents = {settings.arm: first, **models}
    together = {"together": train_in(settings.arm, [own.inputs for own in data.values()])} if settings.together else {}
    return models | together | {name: merge.stage(how, start, parents) for name, how in settings.methods.items()}


def whole_models(recipe: Recipe, models: Mapping[str, Stage[Any]]) -> dict[str, Stage[whole.Settings]]:
    """Return the whole models around those of the arms and the merged ones, where the recipe keeps the rest."""
    base = model.whole_stage(recipe.model)
    names = (*recipe.arms.names, *(recipe.merge.methods if recipe.merge else ()))
    return {name: whole.stage(models[name], base) for name in names} if base else {}
