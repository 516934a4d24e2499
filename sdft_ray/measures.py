"""The stages that measure the models of a recipe: its tasks, and how near each model stays to the base.

In: a recipe, its models by name, and its rows. Out: a stage for each model and task. Recipes that make the same model
share what is measured of it, whatever each calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdft_ray.data.calibration import CorpusSettings, FurtherTexts, describe_further
from sdft_ray.errors import UserError, nearest, problem
from sdft_ray.spec.evaluation import Evaluate
from sdft_ray.spec.recipe import Recipe
from sdft_ray.stages import draft, evaluate, export, model, nll, probes, retention, train
from sdft_ray.store.identity import Stage
from sdft_ray.training_data import Data


def evaluation_stages(
    recipe: Recipe, models: Mapping[str, Stage[Any]], own: Data
) -> dict[tuple[str, str], Stage[evaluate.Settings]]:
    """Return the evaluations, by the name of the model and of the task."""
    return {
        (name, task): evaluate.stage(_way(recipe, stage), task, _known(name, stage), stage, own.read, own.sources)
        for name, stage in models.items()
        for task in recipe.evaluate.tasks
    }


def retention_stages(
    recipe: Recipe, models: Mapping[str, Stage[Any]], own: Data, corpora: Sequence[CorpusSettings]
) -> dict[str, Stage[retention.Settings]]:
    """Return the comparisons with the base, by the name of the model; corpora: what the cut is chosen on."""
    if not (wanted := recipe.evaluate.retention):
        return {}
    texts = describe_further(wanted, corpora)
    _require_untrained(texts, own)
    held = [stage for stage, source in zip(own.read, own.sources.values(), strict=True) if source.held_out]
    base = models["base"]
    probed = probes.stage(recipe.evaluate, texts, base, held)
    return {
        name: retention.stage(recipe.evaluate.dtype, _known(name, stage), base, stage, probed)
        for name, stage in models.items()
    }


def nll_stages(
    recipe: Recipe, base: Stage[model.Settings], data: Mapping[str, Data]
) -> tuple[Stage[nll.Settings], ...]:
    """Return the likelihoods of rewrites and references, one stage for each set of rewrites."""
    if not recipe.distill.shift_rows:
        return ()
    return tuple(
        nll.stage(recipe.distill, base, own.distilled, list(own.sources)) for own in data.values() if own.distilled
    )


def export_stages(recipe: Recipe, models: Mapping[str, Stage[Any]]) -> dict[str, Stage[export.Settings]]:
    """Return the models in other forms, by name and form; raises UserError for one that the recipe does not make."""
    if not (wanted := recipe.export):
        return {}
    chosen = _chosen(models, wanted.models or recipe.arms.names, "export.models")
    return {
        f"{name} {form}": export.stage(form, name, stage) for name, stage in chosen.items() for form in wanted.formats
    }


def draft_stages(recipe: Recipe, models: Mapping[str, Stage[Any]], own: Data) -> dict[str, Stage[draft.Settings]]:
    """Return the models that are tried as drafts, by name; raises UserError for one that the recipe does not make."""
    if not (settings := recipe.draft):
        return {}
    candidates = {name: stage for name, stage in models.items() if name != "base"}
    chosen = _chosen(candidates, settings.models or ("pruned", *recipe.arms.names), "draft.models")
    return {
        name: draft.stage(settings, name, models["pruned"], models["base"], stage, own.read)
        for name, stage in chosen.items()
    }


def _chosen(models: Mapping[str, Stage[Any]], names: Sequence[str], where: str) -> dict[str, Stage[Any]]:
    """Return models by names; raises UserError at `where` a name is that the recipe does not make."""
    for name in names:
        if name not in models:
            raise UserError(problem(where, f"this recipe makes no {name}", nearest(name, models)))
    return {name: models[name] for name in names}


def _require_untrained(texts: FurtherTexts | None, own: Data) -> None:
    """Raise UserError where the plain texts are also rows: a model that has learned them stays near to nothing."""
    for number, stage in enumerate(own.read):
        if texts and getattr(stage.settings.source, "sha256", None) == texts.sha256:
            key = f"rows.{number}" if len(own.read) > 1 else "rows"
            what = f"{texts.path} is trained on as {key}"
            raise UserError(problem("evaluate.retention.text", what, "Give another file"))


def _way(recipe: Recipe, stage: Stage[Any]) -> Evaluate:
    """Return how a model is evaluated: by transformers where vLLM does not read its form."""
    if isinstance(stage.settings, export.Settings) and stage.settings.format != "int8":
        return recipe.evaluate.model_copy(update={"engine": "transformers"})
    return recipe.evaluate


def _known(name: str, stage: Stage[Any]) -> str:
    """Return the name of a model that all recipes give it."""
    return stage.settings.arm if isinstance(stage.settings, train.Settings) else name
