"""The stages that make training data: the rows of each source, their mixture, and the rewrites of them.

In: a recipe. Out: its `Data`. The recipe's own rows and those of other models that are merged are read in one way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sdft_ray.data.calibration import CorpusSettings, describe_corpora
from sdft_ray.results import Counts, Decided
from sdft_ray.spec.recipe import Recipe
from sdft_ray.spec.sources import HubModel, LocalModel, RowSource, ServedModel
from sdft_ray.spec.training import is_on_rewrites
from sdft_ray.stages import distill, mix, model, rows
from sdft_ray.store.identity import Stage, distinct
from sdft_ray.store.storage import Storage

RowsStage = Stage[rows.Settings]
MixedStage = Stage[rows.Settings | mix.Settings]
"""The rows of one source, or several mixed."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows, and the rewrites of them where an arm is trained on those."""

    sources: Mapping[str, RowSource]
    """By the names that people see."""
    read: tuple[RowsStage, ...]
    """The rows of each source."""
    rows: MixedStage
    """Those of the one source, or the mixture of all."""
    distilled: Stage[distill.Settings] | None = None

    @property
    def inputs(self) -> dict[str, Stage[Any]]:
        """The inputs of a training."""
        return {"rows": self.rows} | ({"distilled": self.distilled} if self.distilled else {})

    @property
    def in_order(self) -> tuple[Stage[Any], ...]:
        """The stages, in the order in which they are built."""
        teacher = self.distilled.inputs.get("teacher") if self.distilled else None
        return (*self.read, *([teacher] if teacher else []), *self.inputs.values())


def read_sources(sources: Sequence[RowSource], recipe: Recipe) -> Data:
    """Return the stages of rows: one for each source, and their mixture where there are several."""
    read = tuple(rows.stage(source, recipe.evaluate.preset) for source in sources)
    names = distinct([stage.slug for stage in read])
    mixed = read[0] if len(read) == 1 else mix.stage(read, names, [source.weight for source in sources])
    return Data(dict(zip(names, sources, strict=True)), read, mixed)


def count_rows(stage: MixedStage, storage: Storage) -> Counts:
    """Return how many rows are in each split of a finished stage."""
    return Decided.model_validate(storage.manifest(stage).summary).rows


def training_data(recipe: Recipe, base: Stage[model.Settings], own: Data) -> dict[str, Data]:
    """Return the training data: the recipe's own rows, and those of other models that are merged."""
    others = {name: read_sources(sources, recipe) for name, sources in recipe.others.items()}
    teacher = _teacher(recipe, base)
    data: dict[str, Data] = {}
    for name, each in {"": own, **others}.items():
        rewritten = recipe.arms.need_rewrites and (not name or (recipe.merge and is_on_rewrites(recipe.merge.arm)))
        arguments = (recipe.distill, base, each.rows, each.sources, recipe.train.rows, teacher)
        data[name] = dataclasses.replace(each, distilled=distill.stage(*arguments) if rewritten else None)
    return data


def _teacher(recipe: Recipe, base: Stage[model.Settings]) -> Stage[model.Settings] | None:
    """Return the model that rewrites instead of the base, or the tokenizer of one that is served elsewhere, if any."""
    match recipe.distill.teacher:
        case ServedModel(tokenizer=str(path)):
            return model.tokenizer_stage(path, "distill.teacher.tokenizer")
        case LocalModel() | HubModel() as source:
            teacher = model.stage(source, "distill.teacher.path", teaches=True)
            return None if teacher.id == base.id or source == recipe.model else teacher
    return None


def calibration(recipe: Recipe, own: MixedStage) -> tuple[tuple[CorpusSettings, ...], dict[str, MixedStage]]:
    """Return the calibration corpora, and the rows of those that are rows."""
    stages: dict[str, MixedStage] = {}
    for i, corpus in enumerate(recipe.prune.calibration):
        if corpus.rows is not None:
            stages[f"rows_{i}"] = own if corpus.rows == "own" else rows.stage(corpus.rows, recipe.evaluate.preset)
    names = [stages[key].slug if (key := f"rows_{i}") in stages else None for i in range(len(recipe.prune.calibration))]
    return describe_corpora(recipe.prune.calibration, names), stages
